"""What a graph may make ONNX Runtime open or unfold, read before ONNX Runtime sees it.

ONNX Runtime up to 1.23 reads external data wherever a graph points: outside its folder, even at addresses of the
process; every version reads files that no hash covers. So each tensor's place is compared with the manifest's files
here. Only the protobuf headers are read, weights are skipped; the package onnx is not needed.
"""

from __future__ import annotations

import functools
import itertools
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from mllm_edge.bundle.manifest import StageEntry
from mllm_edge.errors import BadInput

DEEPEST = 64  # messages inside messages; protobuf itself stops at 100
MOST_FIELDS = 5_000_000  # beyond what exporters write by far; a second or two to read
MOST_NODES = 1_000_000  # after functions are unfolded
LOOPS = (b"Loop", b"Scan", b"SequenceMap")
SEARCHES = (b"BeamSearch", b"GreedySearch", b"Sampling", b"WhisperBeamSearch")  # loops of ONNX Runtime's own
MOST_ELEMENTS = 1 << 30  # of a tensor whose size stands in the graph as a constant
# Inputs that say how large an output is; "Range" is apart.
_SIZED = {b"ConstantOfShape": (0,), b"Expand": (1,), b"Tile": (1,), b"Pad": (1,), b"OneHot": (1,), b"Resize": (2, 3)}
_SIZED |= {b"Upsample": (1,), b"CenterCropPad": (1,), b"Range": (0, 1, 2), b"AffineGrid": (1,), b"Col2Im": (1,)}
_SIZED |= {b"BlackmanWindow": (0,), b"HammingWindow": (0,), b"HannWindow": (0,), b"DFT": (1,), b"MaxUnpool": (2,)}
_SIZED |= {b"MelWeightMatrix": (0, 1)}
# Attributes that do so, and how often they count: RoiAlign takes samples in both axes. Of pads there are two an axis.
_SIZES = {b"shape": 1, b"output_shape": 1, b"output_padding": 1, b"scales": 1, b"height_scale": 1, b"width_scale": 1}
_SIZES |= {b"strides": 1, b"dilations": 1, b"pooled_shape": 1, b"output_height": 1, b"output_width": 1}
_SIZES |= {b"sampling_ratio": 2, b"sample_size": 1, b"pads": 1, b"paddings": 1}
_PADS = (b"pads", b"paddings")

# Fields that hold other messages (onnx.proto): those through which a tensor or a node can be reached.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
# Protobuf makes one message of those that stand twice where one belongs: none of the two that were checked.
_ONCE = {"model": (7,), "training": (1, 2), "attribute": (5, 6, 22), "sparse": (1, 2)}
_DIMS, _TYPE, _EXTERNAL, _LOCATION = 1, 2, 13, 14  # of a tensor
_TENSOR_NAME, _RAW = 8, 9
_FUNCTION_NAME, _FUNCTION_DOMAIN, _NODE_OP, _NODE_DOMAIN = 1, 10, 4, 7
_INPUT, _OUTPUT, _ATTRIBUTE = 1, 2, 5  # of a node
_SPARSE_DIMS = 3
# Where small numbers stand: in a tensor by its type, in an attribute.
_NUMBERS = {1: (4, "f"), 2: (5, "B"), 3: (5, "b"), 5: (5, "h"), 6: (5, "i"), 7: (7, "q"), 10: (5, "e"), 11: (10, "d")}
_ATTRIBUTE_NAME, _TENSOR, _SPARSE, _VALUES = 1, 5, 22, {-2: "f", 3: "q", -7: "f", 7: "f", 8: "q"}  # of an attribute
_MOST_NUMBERS = 64
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8}

# Number, value of a varint, start and end of a length-delimited one. The number is negative where the value has a fixed
# length: where another form belongs, protobuf passes over it.
Field = tuple[int, int, int, int]
Operator = tuple[bytes, bytes]  # domain and name


class _Damaged(ValueError):
    """No protobuf, or not one that ONNX can be."""


def check_graph_file(path: Path, stage: StageEntry) -> None:
    """Raises BadInput where the graph is none, reads a file that is not its own, or unfolds without bound."""
    beside = Path(stage.file).parent
    allowed = {os.fsencode(os.path.relpath(file.file, beside)): file.bytes for file in stage.data_files}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Reader(data, allowed).model()
    except (ValueError, IndexError, OverflowError, RecursionError, struct.error) as error:
        raise BadInput(f"{path} is no graph that can be run ({error}); export it again") from None


class _Reader:
    def __init__(self, data: mmap.mmap, allowed: Mapping[bytes, int]):
        self._data, self._allowed, self._left = data, allowed, MOST_FIELDS
        self._constants: dict[bytes, list[list[float]]] = {}  # names may be those of several graphs
        self._sized: list[tuple[bytes, list[bytes]]] = []

    def model(self) -> None:
        """Walk every message; raises ValueError at the first that cannot be."""
        calls: dict[Operator, list[Operator]] = {}
        waiting: list[tuple[str, int, int, int, list[Operator]]] = [("model", 0, len(self._data), 0, [])]
        main = waiting[0][4]
        while waiting:
            kind, start, end, depth, called = waiting.pop()
            if depth > DEEPEST:
                raise _Damaged("graphs are nested without end")
            if kind == "tensor":
                self._tensor(start, end)
                continue
            if kind == "function":
                key = self._operator(start, end, _FUNCTION_DOMAIN, _FUNCTION_NAME)
                called = calls.setdefault(key, [])
            if kind == "node":
                called.append(self._operator(start, end, _NODE_DOMAIN, _NODE_OP))
                self._node(called[-1][1], start, end)
            inner, once, met = _MESSAGES[kind], _ONCE.get(kind, ()), set()
            sizes: list[int] = []
            for number, value, first, last in self._fields(start, end):
                if number in inner and first:
                    if number in once and number in met:
                        raise _Damaged(f"a {inner[number]} stands twice where one belongs")
                    met.add(number)
                    waiting.append((inner[number], first, last, depth + 1, called))
                elif kind == "sparse" and number == _SPARSE_DIMS:
                    sizes += self._packed(first, last) if first else [value]
            if math.prod(sizes) > MOST_ELEMENTS:
                raise _Damaged(f"a sparse tensor is of the shape {sizes}")
        _check_calls(main, calls)
        for operator, inputs in self._sized:
            _check_size(operator, [self._constants.get(name, []) for name in inputs])

    def _fields(self, start: int, end: int) -> Iterator[Field]:
        at = start
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise _Damaged(f"more than {MOST_FIELDS} fields")
            tag, at = self._varint(at, end)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self._varint(at, end)
                yield number, value, 0, 0
            elif wire == 2:
                length, at = self._varint(at, end)
                if length > end - at:
                    raise _Damaged("it ends too early")
                yield number, 0, at, at + length
                at += length
            elif wire in (1, 5):
                at += 8 if wire == 1 else 4
                yield -number, int.from_bytes(self._data[at - (8 if wire == 1 else 4) : min(at, end)], "little"), 0, 0
            else:
                raise _Damaged("it is no protobuf")
        if at != end:
            raise _Damaged("it ends too early")

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while at < end and shift < 70:
            byte = self._data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value & (1 << 64) - 1, at
        raise _Damaged("it ends too early")

    def _operator(self, start: int, end: int, domain: int, name: int) -> Operator:
        texts = {number: self._data[first:last] for number, _, first, last in self._fields(start, end) if first}
        operator = texts.get(domain, b""), texts.get(name, b"")
        if operator[1] == b"EPContext":  # a compiled engine in a file of its own
            raise _Damaged("it holds a compiled engine")
        if operator[1] in (LOOPS if operator[0] in (b"", b"ai.onnx") else SEARCHES):
            raise _Damaged(f"it has a {operator[1].decode()}, which may never end; no system of ours needs one")
        return operator

    def _node(self, operator: bytes, start: int, end: int) -> None:
        """Note a constant's numbers, and where an output is as large as numbers say."""
        fields = list(self._fields(start, end))
        if operator in _SIZED:
            self._sized.append((operator, [self._data[a:b] for n, _, a, b in fields if n == _INPUT]))
        names = [self._data[a:b] for n, _, a, b in fields if n == _OUTPUT] if operator == b"Constant" else []
        elements = 1.0
        for first, last in [(a, b) for n, _, a, b in fields if n == _ATTRIBUTE and a]:
            told = list(self._fields(first, last))
            called = b"".join([self._data[a:b] for n, _, a, b in told if n == _ATTRIBUTE_NAME and a][-1:])
            if not names and called not in _SIZES:
                continue
            values = [one for n, value, a, b in told if n in _VALUES for one in self._numbers(_VALUES[n], value, a, b)]
            elements *= _elements(values, called in _PADS) ** _SIZES.get(called, 0)
            for name in names:
                sparse = any(n == _SPARSE for n, *_ in told)
                self._constants.setdefault(name, []).append([math.inf] if sparse else values)
                for a, b in [(a, b) for n, _, a, b in told if n == _TENSOR and a]:
                    self._tensor(a, b, name)
        if not elements <= MOST_ELEMENTS:
            raise _Damaged(f"its {operator.decode('utf-8', 'replace')} makes {elements:.0e} elements")

    def _numbers(self, form: str, value: int, first: int, last: int) -> list[float]:
        """One field's numbers, as varints or little-endian; infinity where they are more than a shape has."""
        if form in "fd":
            return self._raw(form, first, last) if first else [_fixed(form, value)]
        if first:
            few = last - first <= 10 * _MOST_NUMBERS
            few = few and sum(byte < 128 for byte in self._data[first:last]) <= _MOST_NUMBERS
            if not few:
                return [math.inf]
            values = self._packed(first, last)
        else:
            values = [value]
        if form == "e":  # its bits
            return [_fixed("e", value & 0xFFFF) for value in values]
        return [float(value - (1 << 64) if value >> 63 else value) for value in values]

    def _raw(self, form: str, first: int, last: int) -> list[float]:
        width = struct.calcsize(f"<{form}")
        if last - first > width * _MOST_NUMBERS or (last - first) % width:
            return [math.inf]
        return [float(value) for (value,) in struct.iter_unpack(f"<{form}", self._data[first:last])]

    def _tensor(self, start: int, end: int, name: bytes = b"") -> None:
        sizes: list[int] = []
        place: dict[bytes, bytes] = {}
        kind = external = 0
        own = b""
        told: list[Field] = []
        for number, value, first, last in self._fields(start, end):
            if number == _DIMS:
                sizes += [value] if not first else self._packed(first, last)
            elif number == _TYPE:
                kind = value
            elif number == _LOCATION:
                external = value
            elif number == _EXTERNAL and first:
                entry = {n: self._data[a:b] for n, _, a, b in self._fields(first, last) if a}
                place[entry.get(1, b"")] = entry.get(2, b"")
            elif number == _TENSOR_NAME and first:
                own = self._data[first:last]
            elif abs(number) in (_RAW, 4, 5, 7, 10) and len(told) <= _MOST_NUMBERS:
                told.append((abs(number), value, first, last))
        name = name or own
        if external or place:
            self._external(sizes, kind, place)
            self._constants.setdefault(name, []).append([math.inf])  # what sizes a tensor stands in the graph
            return
        if math.prod(sizes) > 4 * (end - start):  # no type has less than two bits
            raise _Damaged(f"a tensor of the shape {sizes} has {end - start} bytes")
        if name and kind in _NUMBERS:
            few = math.prod(sizes) <= _MOST_NUMBERS
            field, form = _NUMBERS[kind]
            values: list[float] = [] if few else [math.inf]
            for number, value, first, last in told if few else ():
                if number == _RAW and first:
                    values += self._raw(form, first, last)
                elif number == field:
                    values += self._numbers(form, value, first, last)
            if few and len(values) != math.prod(sizes):
                raise _Damaged(f"a tensor of the shape {sizes} has {len(values)} numbers")
            self._constants.setdefault(name, []).append(values)

    def _packed(self, at: int, end: int) -> list[int]:
        values: list[int] = []
        while at < end:
            value, at = self._varint(at, end)
            values.append(value)
            if len(values) > 64:
                raise _Damaged("a tensor has more than 64 axes")
        return values

    def _external(self, sizes: list[int], kind: int, place: Mapping[bytes, bytes]) -> None:
        file = place.get(b"location", b"")  # as it is: a link may stand before a ".."
        location = file.decode("utf-8", "replace")
        if file not in self._allowed:
            raise _Damaged(f"it reads {location!r}, which is no file of the manifest")
        bits = _BITS.get(kind)
        if bits is None:
            raise _Damaged(f"a tensor in {location} is of unknown type {kind}")
        size = bits
        for axis in sizes:
            size *= axis
            if size > 1 << 50:
                raise _Damaged(f"a tensor in {location} is larger than any file")
        size = (size + 7) // 8
        offset = _number(place.get(b"offset", b"0"))
        length = _number(place.get(b"length", b"")) if place.get(b"length") else size
        if length != size or offset + size > self._allowed[file]:
            raise _Damaged(f"a tensor lies outside {location}")


def _number(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise _Damaged(f"an offset or length is {text[:20]!r}")
    return int(text)


def _fixed(form: str, bits: int) -> float:
    value: float = struct.unpack(f"<{form}", bits.to_bytes(struct.calcsize(form), "little"))[0]
    return value


def _elements(values: list[float], pads: bool) -> float:
    """At least so many elements has what these sizes or factors make, of an element."""
    if pads:  # before each axis, then after each
        values = [max(0.0, value) for value in values]  # a negative one crops
        half = len(values) // 2
        values = [1 + sum(pair) for pair in itertools.zip_longest(values[:half], values[half:], fillvalue=0.0)]
    return math.prod(max(1.0, abs(value)) for value in values)


def _check_size(operator: bytes, inputs: list[list[list[float]]]) -> None:
    """A tensor of 10^12 elements is asked for in a few bytes. Sizes that are computed cannot be known by reading."""
    read = [inputs[place] for place in _SIZED[operator] if place < len(inputs)]
    elements = 1.0
    if operator == b"Range":
        start, limit, delta = [[value for values in several for value in values] for several in (*read, [], [], [])][:3]
        steps = [abs(value) for value in delta if value]
        if start and limit and steps:
            elements = max(abs(end - begin) for begin in start for end in limit) / min(steps)
    else:
        for several in read:
            elements *= max((_elements(values, operator == b"Pad") for values in several), default=1)
    if not elements <= MOST_ELEMENTS:
        raise _Damaged(f"its {operator.decode()} makes {elements:.0e} elements")


def _check_calls(main: list[Operator], calls: Mapping[Operator, list[Operator]]) -> None:
    """Functions call functions: thirty that each call the one before twice unfold to 2^30 nodes."""
    open_now: set[Operator] = set()

    @functools.cache
    def nodes(operator: Operator) -> int:
        if operator not in calls:
            return 1
        if operator in open_now or len(open_now) > DEEPEST:
            raise _Damaged("functions call each other without end")
        open_now.add(operator)
        total = sum(map(nodes, calls[operator]))
        open_now.remove(operator)
        return total

    if sum(map(nodes, main)) > MOST_NODES:
        raise _Damaged(f"its functions unfold to more than {MOST_NODES} nodes")
