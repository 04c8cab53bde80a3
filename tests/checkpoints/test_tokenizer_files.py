"""vocab.json and merges.txt: read as transformers' GPT2 tokenizer reads them, and extended by added tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_for_tests import vocabulary_only
from tokenizers_to_test import FLAGS, byte_level, gpt2_lists, write
from transformers import GPT2Tokenizer

from mllm_edge.checkpoints.tokenizer import CONTROL, NORMAL, USER_DEFINED, checkpoint_tokenizer, read_tokenizer
from mllm_edge.checkpoints.tokenizer_files import extend
from mllm_edge.errors import BadInput
from mllm_edge.export.verify.same_tokens import NASTY, assert_same_tokens
from mllm_edge.runtime.engines.llama.tokenizer import GgufTokenizer
from mllm_edge.runtime.prompt import Span, ids_of, tokenized

MARKS = [f"[M{number}]" for number in range(8)]
HARD = [
    *NASTY,
    "'s 's's we'll 12's",
    "a\n b\n\n  c\t\td",
    " lead and trail ",
    "x1y22z333 4444",
    "\u00e9\U0001f600\u4f60 \u00a0 \u2003",
]


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2_lists(tmp_path_factory.mktemp("lists"))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory, lists: Path) -> Path:
    folder = tmp_path_factory.mktemp("extended")
    extend(lists, folder, ["<|image|>"], MARKS)
    return folder


def test_ids_are_those_of_transformers_and_of_llama_cpp(tmp_path: Path, lists: Path) -> None:
    theirs = GPT2Tokenizer(str(lists / "vocab.json"), str(lists / "merges.txt"), add_bos_token=False)
    ours, held = checkpoint_tokenizer(lists), GgufTokenizer(vocabulary_only(tmp_path, lists))
    try:
        for text in HARD:
            expected = theirs.encode(text, add_special_tokens=False)
            assert ours(text) == held.tokenize(text) == expected, text
            assert b"".join(map(held.piece, expected)) == text.encode()
        assert (held.bos, held.eos, held.is_end(2)) == (2, 2, True)
    finally:
        held.close()
    assert_same_tokens(tmp_path / "vocabulary.gguf", lists)


def test_tokens_with_a_role_are_special_and_others_are_text(lists: Path) -> None:
    tokenizer = read_tokenizer(lists)
    assert tokenizer.tokens[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.types[:4] == [NORMAL, CONTROL, CONTROL, NORMAL]
    assert tokenizer.special == {"bos": 2, "eos": 2, "unk": 2, "pad": 1} and tokenizer.add_bos
    assert (tokenizer.model, tokenizer.pre, tokenizer.space_prefix) == ("gpt2", "gpt-2", False)
    encode = checkpoint_tokenizer(lists)
    assert encode("a</s><pad>") == [*encode("a"), 2, 1] and 0 not in encode("<s>") and 3 not in encode("<unk>")


def test_added_tokens_follow_and_any_text_means_the_plain_ones(tmp_path: Path, extended: Path) -> None:
    tokenizer = read_tokenizer(extended)
    assert tokenizer.tokens[384:] == ["<|image|>", *MARKS]
    assert tokenizer.types[384:] == [CONTROL, *[USER_DEFINED] * 8]
    assert tokenizer.special == {"bos": 2, "eos": 2, "unk": 2, "pad": 1} and tokenizer.add_bos
    held = GgufTokenizer(vocabulary_only(tmp_path, extended))
    try:
        assert held.control_tokens == {"<pad>": 1, "</s>": 2, "<|image|>": 384}
        assert held.user_defined == {mark: 385 + number for number, mark in enumerate(MARKS)}
        assert held.tokenize("[M0][M7]") == [385, 392] and held.piece(385) == b"[M0]"
        assert held.piece(384) == b"" and 384 not in held.tokenize("<|image|>")
        assert held.tokenize("<|image|></s>", special=True) == [384, 2]
    finally:
        held.close()
    assert_same_tokens(tmp_path / "vocabulary.gguf", extended, HARD)


def test_white_space_beside_them_goes_in_the_host_as_the_slow_tokenizer_did(tmp_path: Path, extended: Path) -> None:
    """Split at added tokens, strip beside them, tokenize each piece alone (the rule of GILL's pinned tokenizer)."""
    added, plain = ["<|image|>", *MARKS], checkpoint_tokenizer(extended)
    held = GgufTokenizer(vocabulary_only(tmp_path, extended))
    try:

        def told(text: str, trusted: bool) -> list[int]:
            return ids_of(text, held, added, trusted)

        for trusted in (False, True):
            assert told("a cat [M0] \t[M1] the end", trusted) == [*plain("a cat"), 385, 386, *plain("the end")]
            assert told("[M7]\n", trusted) == told(" [M7]", trusted) == [392]
            assert told(" no  marks \n", trusted) == plain(" no  marks \n")
        assert told("a <|image|> b </s> c", True) == [*plain("a"), 384, *plain("b "), 2, *plain(" c")]
        spelled = told("a <|image|>", False)
        assert 384 not in spelled and b"".join(map(held.piece, spelled)) == b"a <|image|>"
        (run,) = tokenized([Span("what [M", True), Span("0] is", False)], held, added)
        assert run == plain("what [M0] is")  # whose parts are joined first: llama.cpp's own reading
    finally:
        held.close()


def test_what_a_bare_pair_of_files_lacks_is_told(tmp_path: Path) -> None:
    bare, folder = tmp_path / "bare", tmp_path / "folder"
    bare.mkdir()
    gpt2_lists(bare)
    (bare / "tokenizer_config.json").unlink()
    config = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    extend(bare, folder, ["<pad>", "</s>", "<|image|>"], MARKS, config)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.special == {"bos": 2, "eos": 2, "pad": 1} and tokenizer.add_bos
    assert [tokenizer.types[number] for number in (1, 2, 384)] == [CONTROL] * 3
    extend(folder, tmp_path / "again", ["<|image|>"], MARKS)
    read_tokenizer.cache_clear()
    assert read_tokenizer(tmp_path / "again") == tokenizer


def test_added_tokens_that_transformers_4_saved(tmp_path: Path) -> None:
    folder = gpt2_lists(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write(folder / "added_tokens.json", {"<|image|>": 384, "[M0]": 385})
    write(folder / "tokenizer_config.json", {**config, "cls_token": "<|image|>"})
    assert read_tokenizer(folder).types[384:] == [CONTROL, USER_DEFINED]
    decoder = {"384": {**FLAGS, "content": "<|image|>", "special": True, "normalized": True}}
    write(folder / "tokenizer_config.json", {**config, "added_tokens_decoder": decoder})
    read_tokenizer.cache_clear()
    assert read_tokenizer(folder).types[384:] == [CONTROL, USER_DEFINED]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", '{"a": "b"}', "no table of tokens"),
        ("vocab.json", '{"a": -1}', "no table of tokens"),
        ("vocab.json", "{", "not valid JSON"),
        ("added_tokens.json", '{"a": true}', "no table of tokens"),
        ("merges.txt", "#version: 0.2\na b c\n", "not two tokens"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = gpt2_lists(tmp_path)
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=f"{file} .*{message}"):
        read_tokenizer(folder)


@pytest.mark.parametrize("kind", ["gpt-2", "none"])
def test_only_what_is_there_can_be_extended(tmp_path: Path, kind: str) -> None:
    folder: Any = tmp_path
    if kind == "none":
        with pytest.raises(BadInput, match=r"neither tokenizer\.json nor vocab\.json and merges\.txt"):
            extend(folder, tmp_path / "more", [], MARKS)
        return
    extend(byte_level(folder, kind), tmp_path / "more", [], MARKS)
    tokenizer = read_tokenizer(tmp_path / "more")
    assert tokenizer.tokens[-8:] == MARKS and tokenizer.types[-9:] == [USER_DEFINED] * 9
