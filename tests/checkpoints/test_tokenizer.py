"""Tokenizers that llama.cpp does not have are refused by name before anything is written; others are read correctly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from gguf_for_tests import causal, vocabulary_only
from tokenizers_to_test import FLAGS, byte_level, llama_fast, llama_sentencepiece, write

from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer, lead, read_tokenizer
from mllm_edge.errors import BadInput, OutOfTolerance
from mllm_edge.export.gguf.maps import tensor_shapes
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.export.verify.same_tokens import NASTY, assert_same_tokens
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.runtime.engines.llama.tokenizer import GgufTokenizer

Data = dict[str, Any]


def change(folder: Path, edit: Callable[[Data], object]) -> Path:
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    edit(data)
    write(folder / "tokenizer.json", data)
    return folder


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("make", [lambda d: byte_level(d, "gpt-2"), lambda d: llama_fast(d, legacy=True)])
def test_added_tokens_that_swallow_spaces_are_refused(tmp_path: Path, make: Callable[[Path], Path], flag: str) -> None:
    folder = change(make(tmp_path), lambda data: data["added_tokens"][-1].update({flag: True}))
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"][-1]["content"]
    with pytest.raises(BadInput, match=f"'{text}' has {flag}"):
        read_tokenizer(folder)


def test_flags_count_without_tokenizer_json(tmp_path: Path) -> None:
    folder = llama_sentencepiece(tmp_path)
    config = {"added_tokens_decoder": {"2": {**FLAGS, "content": "</s>", "special": True, "rstrip": True}}}
    write(folder / "tokenizer_config.json", config)
    with pytest.raises(BadInput, match="'</s>' has rstrip"):
        read_tokenizer(folder)


def test_normalized_added_tokens_matter_only_after_a_prepended_space(tmp_path: Path) -> None:
    legacy, first = tmp_path / "legacy", tmp_path / "first"
    for folder in (legacy, first):
        folder.mkdir()
        change(
            llama_fast(folder, legacy=folder == legacy),
            lambda data: data["added_tokens"][-1].update(normalized=True),
        )
    with pytest.raises(BadInput, match="'<image>' has normalized"):
        read_tokenizer(legacy)
    assert_same_tokens(vocabulary_only(tmp_path, first), first)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (lambda data: data.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda data: data.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}]}), "NFKC"),
        (lambda data: data["model"].update(type="WordPiece"), "WordPiece"),
        (lambda data: data["model"].pop("vocab"), "no vocabulary"),
        (lambda data: data["model"].pop("merges"), "no vocabulary or no merges"),
    ],
)
def test_byte_level_that_llama_cpp_does_not_have(tmp_path: Path, edit: Callable[[Data], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_tokenizer(change(byte_level(tmp_path, "gpt-2"), edit))


@pytest.mark.parametrize(
    ("step", "setting", "message"),
    [(0, {"behavior": "Removed"}, "Removed"), (0, {"invert": True}, "Split"), (1, {"use_regex": True}, "True")],
)
def test_a_known_pattern_used_otherwise(tmp_path: Path, step: int, setting: Data, message: str) -> None:
    folder = change(
        byte_level(tmp_path, "llama-bpe"), lambda data: data["pre_tokenizer"]["pretokenizers"][step].update(setting)
    )
    with pytest.raises(BadInput, match=f"not known: .*{message}"):
        read_tokenizer(folder)


@pytest.mark.parametrize(("pre", "ignore"), [("gpt-2", True), ("qwen2", True), ("llama-bpe", False)])
def test_whole_words_without_merges(tmp_path: Path, pre: str, ignore: bool) -> None:
    """llama.cpp takes a word that is a token whole for Llama 3 only, whatever `ignore_merges` says."""
    folder = change(byte_level(tmp_path, pre), lambda data: data["model"].update(ignore_merges=ignore))
    read_tokenizer(folder)  # every token comes from a merge: both ways give the same
    read_tokenizer.cache_clear()
    change(folder, lambda data: data["model"].update(merges=data["model"]["merges"][:-1]))
    with pytest.raises(BadInput, match="no merge makes"):
        read_tokenizer(folder)


@pytest.mark.parametrize("setting", [{"prepend_scheme": "always"}, {"prepend_scheme": None, "add_prefix_space": True}])
def test_a_space_before_every_piece_that_has_none(tmp_path: Path, setting: Data) -> None:
    """transformers 5 writes `always` for legacy=True; tokenizers before 0.15 wrote add_prefix_space alone."""

    def edit(data: Data) -> None:
        changed = {**data["pre_tokenizer"], **setting}
        data["pre_tokenizer"] = {key: value for key, value in changed.items() if value is not None}

    with pytest.raises(BadInput, match="prepend_scheme always"):
        read_tokenizer(change(llama_fast(tmp_path, legacy=False), edit))


def test_no_space_at_all(tmp_path: Path) -> None:
    folder = change(
        llama_fast(tmp_path, legacy=False), lambda data: data["pre_tokenizer"].update(prepend_scheme="never")
    )
    assert_same_tokens(vocabulary_only(tmp_path, folder), folder)
    assert lead(folder) == ""


def test_every_added_token_is_compared(tmp_path: Path) -> None:
    """The twentieth differs: its text in the GGUF is not the checkpoint's."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
        byte_level(folder, "gpt-2")
        first = 1 + max(token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"])
        names = [f"<t{i}>" for i in range(20)]
        if folder == other:
            names[-1] = "<last>"
        entries = [{**FLAGS, "id": first + i, "content": name, "special": True} for i, name in enumerate(names)]
        change(folder, lambda data, entries=entries: data["added_tokens"].extend(entries))
    path = vocabulary_only(tmp_path, mine)
    assert_same_tokens(path, mine)
    with pytest.raises(OutOfTolerance, match="a<last>b"):
        assert_same_tokens(path, other)


def test_sentencepiece_that_is_not_legacy_is_announced(tmp_path: Path) -> None:
    folder = llama_sentencepiece(tmp_path)
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>", "legacy": False})
    with pytest.warns(UserWarning, match="legacy false"):
        assert read_tokenizer(folder).space_prefix


def test_pieces_are_fresh_strings_without_bos(tmp_path: Path) -> None:
    """LLaVA tokenizes the text after a picture as a string of its own: the space piece, then the newline."""
    folder = llama_sentencepiece(tmp_path)
    tokens = read_tokenizer(folder).tokens
    encode = checkpoint_tokenizer(folder)
    assert [tokens[i] for i in encode("\nWhat")][:2] == ["\u2581", "<0x0A>"]
    assert encode("") == []
    assert encode("</s>") == [2]


def test_special_tokens_and_unused_rows(tmp_path: Path) -> None:
    """The llava-hf table: <image> after the trained tokens, more rows than tokens."""
    folder = llama_sentencepiece(tmp_path)
    dims = LlamaDims(vocabulary=448, width=32, ffn_width=32, layers=1, heads=1, kv_heads=1, context=32)
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(dims).items()}
    export_language_model(causal(dims, state, folder), tmp_path / "model.gguf", "f32")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    roles = {name: field.contents() for name, field in fields.items() if name.endswith("_token_id")}
    assert {name.split(".")[-1]: token for name, token in roles.items()} == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    tokenizer = GgufTokenizer(tmp_path / "model.gguf")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.control_tokens["<image>"]) == (1, 2, 420)
    tokenizer.close()
    assert_same_tokens(tmp_path / "model.gguf", folder, [*NASTY, "[PAD430]", "[PAD447] x"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"type": "Unigram"}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(tmp_path: Path, data: dict[str, object], message: str) -> None:
    write(tmp_path / "tokenizer.json", data)
    with pytest.raises(BadInput, match=message):
        read_tokenizer(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="none of"):
        read_tokenizer(tmp_path)
