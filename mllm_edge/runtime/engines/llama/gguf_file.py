"""A GGUF file's head, read before llama.cpp sees it: on much of what is wrong in one, llama.cpp ends the process.

Only the head is read (numbers, texts, the table of tensors); the package gguf is not needed.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import BadInput

MOST_KEYS, MOST_TENSORS, MOST_TOKENS = 4096, 1 << 16, 1 << 22
MOST_LAYERS = 512  # LLAMA_MAX_LAYERS
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_F32, _VECTORS = 0, 1
# Values and bytes of a block, by ggml_type: F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, BF16. Matrices of
# others are not multiplied by every backend.
_BLOCKS = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
_BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 30: (1, 2)}


Whole = Callable[[str, int, int | None], int]  # a count by its key and most, or where it lacks the third
Real = Callable[[str, float, float | None], None]


class _Damaged(ValueError):
    """What llama.cpp must not be given."""


@dataclass(frozen=True)
class Head:
    """What stands before the weights: values by key (an array as numpy's or a list of bytes), the shape of each tensor
    as the file has it; its bytes, and what names them and the file's size."""

    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    length: int
    sha256: str


def name_of(head: bytes, size: int) -> str:
    """What names a head of a file of so many bytes."""
    about = hashlib.sha256(head)
    about.update(str(size).encode())
    return about.hexdigest()


def read_head(path: Path) -> Head:
    """Read and check a file's head. Raises BadInput where llama.cpp could not live with it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _Reader(data).head()
        _check_model(head)
    except (ValueError, struct.error, OverflowError) as error:
        raise BadInput(f"{path} is no GGUF that can be run ({error}); export the bundle again") from None
    return head


@dataclass(frozen=True)
class _Sizes:
    """The width, heads of queries, heads of keys and values, and the channels of a head."""

    width: int
    heads: int
    groups: int
    head: int


class _Reader:
    def __init__(self, data: mmap.mmap):
        self._data, self._at = data, 0

    def head(self) -> Head:
        if self._take(4) != b"GGUF" or self._number("<u4") not in (2, 3):
            raise _Damaged("it is no GGUF of version 2 or 3")
        tensors, keys = int(self._number("<u8")), int(self._number("<u8"))
        if tensors > MOST_TENSORS or keys > MOST_KEYS:
            raise _Damaged(f"it counts {tensors} tensors and {keys} values")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._text()
            if name in values:
                raise _Damaged(f"{name} is there twice")
            values[name] = self._value(int(self._number("<u4")))
        shapes = self._tensors(tensors, values.get("general.alignment", 32))
        return Head(values, shapes, self._at, name_of(self._data[: self._at], len(self._data)))

    def _tensors(self, count: int, alignment: Any) -> dict[str, tuple[int, ...]]:
        if not isinstance(alignment, int) or alignment not in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise _Damaged(f"its alignment is {alignment!r}")
        shapes: dict[str, tuple[int, ...]] = {}
        end = 0
        for _ in range(count):
            name = self._text()
            axes = int(self._number("<u4"))
            if not 1 <= axes <= 4 or not 0 < len(name) < 64 or name in shapes:
                raise _Damaged(f"tensor {name[:80]!r} is there twice, or its name or its {axes} axes cannot be")
            shape = tuple(int(self._number("<u8")) for _ in range(axes))
            kind, offset = int(self._number("<u4")), int(self._number("<u8"))
            if kind not in _BLOCKS or (axes == _VECTORS and kind != _F32):
                raise _Damaged(f"{name} is of type {kind}, which cannot be computed with")
            values, size = _BLOCKS[kind]
            if not all(0 < axis < 1 << 31 for axis in shape) or shape[0] % values or math.prod(shape) >= 1 << 48:
                raise _Damaged(f"{name} has the shape {list(shape)}")
            if offset != end:
                raise _Damaged(f"{name} lies at {offset}, not at {end}")
            end += math.prod(shape) // values * size
            last, end = end, -(-end // alignment) * alignment
            shapes[name] = shape
        start = -(-self._at // alignment) * alignment
        if count and start + last > len(self._data):
            raise _Damaged("its weights end too early")
        return shapes

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            if kind == _BOOL and self._data[self._at : self._at + 1] not in (b"\0", b"\1"):
                raise _Damaged("a yes or no is neither")
            return self._number(_SCALARS.get(kind, ""))
        kind, count = int(self._number("<u4")), int(self._number("<u8"))
        if count > MOST_TOKENS:
            raise _Damaged(f"an array has {count} values")
        if kind == _STRING:
            return self._texts(count)
        dtype = _dtype(_SCALARS.get(kind, ""))
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _number(self, form: str) -> int | float:
        dtype = _dtype(form)
        number: int | float = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
        return number

    def _text(self) -> str:
        return self._bytes().decode("utf-8", "replace")

    def _bytes(self) -> bytes:
        return self._take(int.from_bytes(self._take(8), "little"))

    def _texts(self, count: int) -> list[bytes]:
        """Many texts in a row: a vocabulary's 400,000 cost half a second one by one."""
        data, at, end, length = self._data, self._at, len(self._data), struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            size = length(data, at)[0]  # raises struct.error at the file's end
            at += 8 + size
            if at > end:
                raise _Damaged("it ends too early")
            texts.append(data[at - size : at])
        self._at = at
        return texts

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise _Damaged("it ends too early")
        self._at += size
        return self._data[self._at - size : self._at]


def _dtype(form: str) -> np.dtype[Any]:
    if not form:
        raise _Damaged("a value is of unknown type")
    return np.dtype(form)


def _check_model(head: Head) -> None:
    values = head.values
    kind = values.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise _Damaged(f"its architecture is {kind!r:.40}; known: {', '.join(ARCHITECTURES)}")

    def whole(key: str, most: int, default: int | None = None) -> int:
        value = values.get(f"{kind}.{key}", default)
        if type(value) is not int or not 0 < value <= most:
            raise _Damaged(f"{kind}.{key} is {value if isinstance(value, (int, float, str)) else 'of another type'}")
        return value

    def real(key: str, least: float, default: float | None) -> None:
        value = values.get(f"{kind}.{key}", default)
        if not isinstance(value, float) or not least <= value < 1e12:  # a NaN is neither
            raise _Damaged(f"{kind}.{key} is {value!r}")

    width, heads = whole("embedding_length", 1 << 16), whole("attention.head_count", 1 << 12)
    whole("context_length", MOST_TOKENS), whole("feed_forward_length", 1 << 20), whole("block_count", MOST_LAYERS)
    groups = whole("attention.head_count_kv", heads, heads)
    size = whole("attention.key_length", 1 << 12, max(width // heads, 1))
    if heads % groups or whole("attention.value_length", 1 << 12, size) != size:
        raise _Damaged(f"it has {heads} heads, {groups} of keys")
    if values.get(f"{kind}.expert_count", 0) != 0:
        raise _Damaged("it has experts")
    ARCHITECTURES[kind](_Sizes(width, heads, groups, size), whole, real)
    _check_vocabulary(head, whole)


def _check_llama(sizes: _Sizes, whole: Whole, real: Real) -> None:
    if whole("rope.dimension_count", sizes.head, sizes.head) % 2:
        raise _Damaged("rotary positions need pairs")
    real("attention.layer_norm_rms_epsilon", 0.0, None)
    real("rope.freq_base", 1.0, 1e4)


def _check_gpt2(sizes: _Sizes, whole: Whole, real: Real) -> None:
    """Heads are views of one matrix of width D, 3 D high."""
    if sizes.heads != sizes.groups or sizes.heads * sizes.head != sizes.width:
        raise _Damaged(f"it has {sizes.heads} heads of {sizes.head} in a width of {sizes.width}")
    real("attention.layer_norm_epsilon", 0.0, None)


ARCHITECTURES: dict[str, Callable[[_Sizes, Whole, Real], None]] = {  # those that export writes
    "llama": _check_llama,
    "gpt2": _check_gpt2,
}


def _check_vocabulary(head: Head, whole: Whole) -> None:
    values, prefix = head.values, "tokenizer.ggml."
    tokens = values.get(f"{prefix}tokens")
    if not isinstance(tokens, list) or not tokens:
        raise _Damaged("it has no tokens")
    whole("vocab_size", len(tokens), len(tokens))
    if (table := head.shapes.get("token_embd.weight")) and table[-1] != len(tokens):
        raise _Damaged(f"it has {len(tokens)} tokens and {table[-1]} rows of embeddings")
    places: dict[bytes, int] = {}
    for place, token in enumerate(tokens):
        if not token or token in places:
            text = token.decode("utf-8", "replace")
            raise _Damaged(
                f"token {place} is the text {text!r}, {f'as is token {places[token]}' if token else 'which is empty'}"
            )
        places[token] = place
    for key, form in (("scores", "f"), ("token_type", "i")):
        column = values.get(prefix + key)
        if column is not None and (
            not isinstance(column, np.ndarray) or column.dtype.str != f"<{form}4" or len(column) != len(tokens)
        ):
            raise _Damaged(f"{prefix}{key} has not a value for each token")
    for key, value in values.items():
        if key.startswith(prefix) and key.endswith("_token_id") and not (type(value) is int and value < len(tokens)):
            raise _Damaged(f"{key} is {value!r:.40} of {len(tokens)} tokens")
    if values.get(f"{prefix}model") == "llama" and not _all_bytes(places):
        raise _Damaged("a byte has no token")
    for merge in values.get(f"{prefix}merges", []):
        if not isinstance(merge, bytes) or b" " not in merge[1:-1]:
            raise _Damaged("a merge is not of two tokens")


def _all_bytes(places: Mapping[bytes, int]) -> bool:
    """Whether each byte is a token, which llama.cpp looks for when a text is in no other."""
    return all(b"<0x%02X>" % byte in places or bytes([byte]) in places for byte in range(256))
