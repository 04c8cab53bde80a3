"""The tokenizer inside a GGUF file, without its weights."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.llama.tokenizer import GgufTokenizer


@pytest.fixture
def tokenizer(tiny_bundle: Path) -> Iterator[GgufTokenizer]:
    loaded = GgufTokenizer(tiny_bundle / "language_model.gguf")
    yield loaded
    loaded.close()


def test_tokens_and_text(tokenizer: GgufTokenizer) -> None:
    assert tokenizer.bos == 1 and tokenizer.is_end(2) and not tokenizer.is_end(280)
    assert tokenizer.control_tokens == {"<s>": 1, "</s>": 2}
    assert tokenizer.tokenize("") == []
    assert tokenizer.tokenize("</s>", special=True) == [2]
    assert 2 not in tokenizer.tokenize("a</s>")
    text = "the 🙂 é\n\u4e2d"
    assert b"".join(map(tokenizer.piece, tokenizer.tokenize(text))) == b" " + text.encode()
    assert tokenizer.piece(2) == b"" and tokenizer.piece(3 + 0xC3) == b"\xc3"
    long = "the red " * 2000
    assert b"".join(map(tokenizer.piece, tokenizer.tokenize(long))) == b" " + long.encode()


def test_a_closed_tokenizer_says_so(tokenizer: GgufTokenizer) -> None:
    tokenizer.close()
    tokenizer.close()
    for call in (
        lambda: tokenizer.tokenize("a"),
        lambda: tokenizer.piece(1),
        lambda: tokenizer.is_end(1),
        lambda: tokenizer.control_tokens,
    ):
        with pytest.raises(MllmEdgeError, match="closed"):
            call()


def test_unknown_ids_are_errors_not_crashes(tokenizer: GgufTokenizer) -> None:
    for token in (-1, tokenizer.vocabulary):
        with pytest.raises(MllmEdgeError, match="token ids"):
            tokenizer.piece(token)
        with pytest.raises(MllmEdgeError, match="token ids"):
            tokenizer.is_end(token)


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(1 << 20))
    with pytest.raises(BadInput, match=r"bad\.gguf"):
        GgufTokenizer(tmp_path / "bad.gguf")
