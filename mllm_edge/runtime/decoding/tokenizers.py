"""Tokenizers, apart from language models: a bundle may have several, and a stage may read text, too."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from mllm_edge.bundle import manifest
from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput, MissingPackage

MOST_BYTES = 256 << 20  # of a tokenizer.json


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        bos: the id that opens every sequence, or None.
        eos: the id that ends one, or None.
        vocabulary: number of ids.
    """

    bos: int | None
    eos: int | None
    vocabulary: int

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Control strings, such as `</s>`, and their ids."""
        ...

    @property
    def user_defined(self) -> Mapping[str, int]:
        """Added tokens that any text may mean, and that are shown as they are, with their ids."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a piece of text as a fresh string, without BOS. Control strings are plain text."""
        ...

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, perhaps a part of a character; nothing for a control token."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        ...

    def close(self) -> object:
        """Free it."""
        ...


def named(tokenizer: Tokenizer) -> dict[str, int]:
    """All tokens that a manifest may name, and their ids."""
    return {**tokenizer.user_defined, **tokenizer.control_tokens}


class JsonTokenizer:
    """A `tokenizer.json`, by the package `tokenizers`.

    Raises:
        BadInput: it cannot be read, or lacks a token that the manifest names.
        MissingPackage: tokenizers is not installed.
    """

    def __init__(self, path: Path, entry: manifest.Tokenizer):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise MissingPackage("tokenizers", "onnx") from None
        text = read_text(path, MOST_BYTES)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001  the package raises plain Exception
            raise BadInput(f"{path} is no tokenizer ({error}); export the bundle again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = json.loads(text).get("added_tokens", [])
        self.control_tokens = {one["content"]: int(one["id"]) for one in added if one.get("special")}
        self.user_defined = {one["content"]: int(one["id"]) for one in added if not one.get("special")}
        self._control = set(self.control_tokens.values())
        self._byte_level = '"ByteLevel"' in text
        self.vocabulary = int(self._tokenizer.get_vocab_size())
        self.bos = self._id(entry.bos, path) if entry.bos else None
        ends = [self._id(token, path) for token in entry.ends]
        self.eos, self._ends = next(iter(ends), None), set(ends)

    def _id(self, token: str, path: Path) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise BadInput(f"{path} has no token {token!r}; export the bundle again")
        return int(found)

    def tokenize(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        self._tokenizer.encode_special_tokens = True  # a user's `</s>` is four letters
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int) -> bytes:
        """See `Tokenizer`."""
        text = self._tokenizer.id_to_token(token)
        if text is None or token in self._control:
            return b""
        if self._byte_level:
            return bytes(_BYTES.get(letter, ord("?")) for letter in text)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", text):
            return bytes([int(found[1], 16)])
        return str(text).replace("\u2581", " ").encode()

    def is_end(self, token: int) -> bool:
        """See `Tokenizer`."""
        return token in self._ends

    def close(self) -> None:
        """Nothing to free."""


def _letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE (openai/gpt-2 encoder.py `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _letters()


def _gguf(path: Path, entry: manifest.Tokenizer) -> Tokenizer:
    from mllm_edge.runtime.engines.llama.tokenizer import GgufTokenizer

    return GgufTokenizer(path)


KINDS: dict[str, Callable[[Path, manifest.Tokenizer], Tokenizer]] = {"gguf": _gguf, "json": JsonTokenizer}
