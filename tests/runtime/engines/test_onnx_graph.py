"""Graphs of attackers, written byte by byte: what ONNX Runtime would read or unfold is refused before it starts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from mllm_edge.bundle.manifest import StageEntry
from mllm_edge.bundle.sources import FileEntry
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines import onnx_graph
from mllm_edge.runtime.engines.onnx_graph import check_graph_file


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def text(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def whole(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def tensor(location: bytes, offset: bytes = b"0", length: bytes = b"16") -> bytes:
    """Four fp32 numbers in another file."""
    place = ((b"location", location), (b"offset", offset), (b"length", length))
    return (
        whole(1, 4)
        + whole(2, 1)
        + text(8, b"w")
        + whole(14, 1)
        + b"".join(text(13, text(1, key) + text(2, value)) for key, value in place)
    )


def graph(*fields: bytes) -> bytes:
    return text(7, b"".join(fields))


def initializer(data: bytes) -> bytes:
    return graph(text(5, data))


def in_constant(data: bytes) -> bytes:
    return graph(text(1, text(4, b"Constant") + text(5, text(5, data))))


def in_branch(data: bytes) -> bytes:
    return graph(text(1, text(4, b"If") + text(5, text(6, text(5, data)))))


def in_sparse(data: bytes) -> bytes:
    return graph(text(15, text(1, data)))


def in_function(data: bytes) -> bytes:
    return text(25, text(1, b"f") + text(7, text(4, b"Constant") + text(5, text(5, data))))


PLACES = [initializer, in_constant, in_branch, in_sparse, in_function]


def check(folder: Path, data: bytes) -> None:
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "a.onnx").write_bytes(data)
    weights = FileEntry("parts/a.data", 64, "")
    check_graph_file(
        folder / "parts" / "a.onnx",
        StageEntry("parts/a.onnx", 0, "", "a", "onnx", "fp32", [], [], data_files=[weights]),
    )


@pytest.mark.parametrize("place", PLACES)
def test_weights_in_a_file_of_the_manifest(tmp_path: Path, place: Callable[[bytes], bytes]) -> None:
    check(tmp_path, place(tensor(b"a.data", b"48")))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", [b"../secret", b"/etc/passwd", b"*/_ORT_MEM_ADDR_/*", b"other", b"", b"parts/a.data"])
def test_weights_elsewhere(tmp_path: Path, place: Callable[[bytes], bytes], where: bytes) -> None:
    with pytest.raises(BadInput, match="no file of the manifest"):
        check(tmp_path, place(tensor(where)))


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (b"49", b"16", "lies outside"),
        (b"0", b"20", "lies outside"),  # more than its four numbers
        (b"-1", b"16", "offset or length"),
        (b"9" * 400, b"16", "offset or length"),
        (b"0", b"x", "offset or length"),
    ],
)
def test_weights_outside_their_file(tmp_path: Path, offset: bytes, length: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        check(tmp_path, initializer(tensor(b"a.data", offset, length)))


def test_thirty_functions_that_each_call_the_one_before_twice(tmp_path: Path) -> None:
    functions = [text(25, text(1, b"f%d" % at) + 2 * text(7, text(4, b"f%d" % (at - 1)))) for at in range(30)]
    with pytest.raises(BadInput, match="unfold to more than"):
        check(tmp_path, b"".join(functions) + graph(text(1, text(4, b"f29"))))


def test_functions_in_a_circle(tmp_path: Path) -> None:
    functions = [text(25, text(1, name) + text(7, text(4, other))) for name, other in ((b"f", b"g"), (b"g", b"f"))]
    with pytest.raises(BadInput, match="without end"):
        check(tmp_path, b"".join(functions) + graph(text(1, text(4, b"f"))))


def test_graphs_nested_without_end(tmp_path: Path) -> None:
    inner = b""
    for _ in range(40):
        inner = text(1, text(4, b"If") + text(5, text(6, inner or whole(1, 1))))
    with pytest.raises(BadInput, match="nested without end"):
        check(tmp_path, graph(inner))


@pytest.mark.parametrize("name", [b"Loop", b"Scan"])
def test_loops_may_never_end(tmp_path: Path, name: bytes) -> None:
    for domain in (b"", text(7, b"ai.onnx")):
        with pytest.raises(BadInput, match="which may never end"):
            check(tmp_path, graph(text(1, text(4, name) + domain)))


def test_searches_of_onnx_runtime_are_loops(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="which may never end"):
        check(tmp_path, graph(text(1, text(4, b"BeamSearch") + text(7, b"com.microsoft"))))


def numbers(name: bytes, values: list[int], raw: bool) -> bytes:
    """An int64 tensor in the graph itself."""
    data = struct.pack(f"<{len(values)}q", *values)
    packed = b"".join(varint(value % (1 << 64)) for value in values)
    return whole(1, len(values)) + whole(2, 7) + text(8, name) + (text(9, data) if raw else text(7, packed))


def node(operator: bytes, *inputs: bytes) -> bytes:
    return text(1, b"".join(text(1, name) for name in inputs) + text(2, b"out") + text(4, operator))


def constant(tensor: bytes) -> bytes:
    return text(1, text(2, b"n") + text(4, b"Constant") + text(5, text(1, b"value") + text(5, tensor)))


def ints(values: list[int]) -> bytes:
    attribute = text(1, b"value_ints") + text(8, b"".join(map(varint, values)))
    return text(1, text(2, b"n") + text(4, b"Constant") + text(5, attribute))


FORMS: list[Callable[[list[int]], bytes]] = [
    lambda values: text(5, numbers(b"n", values, raw=True)),
    lambda values: text(5, numbers(b"n", values, raw=False)),
    lambda values: constant(numbers(b"", values, raw=True)),
    ints,
]


@pytest.mark.parametrize("form", FORMS)
def test_constants_that_ask_for_more_than_memory(tmp_path: Path, form: Callable[[list[int]], bytes]) -> None:
    for use in (node(b"ConstantOfShape", b"n"), node(b"Expand", b"x", b"n"), node(b"Resize", b"x", b"", b"", b"n")):
        check(tmp_path, graph(form([1, 3, 1024, 1024]), use))
        with pytest.raises(BadInput, match="elements"):
            check(tmp_path, graph(use, form([1 << 20, 1 << 20])))
        check(tmp_path, graph(use, *[form([1 << 10, 1 << 10])] * 9))  # a name in several graphs
    check(tmp_path, graph(form([0, 0, 512, 512] * 2), node(b"Pad", b"x", b"n")))
    check(tmp_path, graph(form([2] * 65), node(b"Gather", b"x", b"n")))  # no shape
    with pytest.raises(BadInput, match="Tile makes inf"):
        check(tmp_path, graph(form([2] * 65), node(b"Tile", b"x", b"n")))
    with pytest.raises(BadInput, match="Pad makes 1e"):
        check(tmp_path, graph(form([1 << 20, 1 << 20, 0, 0]), node(b"Pad", b"x", b"n")))


def test_ranges_that_ask_for_more_than_memory(tmp_path: Path) -> None:
    ends = [text(5, numbers(name, [value], raw=True)) for name, value in ((b"a", 0), (b"b", 1 << 40), (b"c", 1 << 30))]
    check(tmp_path, graph(*ends, node(b"Range", b"a", b"b", b"c")))
    with pytest.raises(BadInput, match="Range makes 1e"):
        check(tmp_path, graph(*ends, text(5, numbers(b"d", [-1], raw=False)), node(b"Range", b"a", b"b", b"d")))


def test_ranges_of_other_types(tmp_path: Path) -> None:
    def ends(kind: int, *values: bytes) -> bytes:
        return b"".join(
            text(5, whole(2, kind) + text(8, name) + value) for name, value in zip((b"a", b"b", b"d"), values)
        )

    span = node(b"Range", b"a", b"b", b"d")
    doubles = [text(10, struct.pack("<d", value)) for value in (0, 1e12, 1)]
    halves = [whole(5, int.from_bytes(struct.pack("<e", value), "little")) for value in (0, 6e4, 6e-8)]
    unpacked = [varint(4 << 3 | 5) + struct.pack("<f", value) for value in (0, 1e12, 1)]
    for kind, values in ((11, doubles), (10, halves), (1, unpacked)):
        with pytest.raises(BadInput, match="Range makes 1e"):
            check(tmp_path, graph(ends(kind, *values), span))
    check(tmp_path, graph(ends(5, whole(5, 0), whole(5, 30_000), whole(5, 1)), span))


def sized(operator: bytes, **sizes: list[int]) -> bytes:
    """A node whose attributes say sizes."""
    told = [text(5, text(1, name.encode()) + b"".join(whole(8, size) for size in sizes[name])) for name in sizes]
    return text(1, text(4, operator) + b"".join(told))


def test_attributes_that_ask_for_more_than_memory(tmp_path: Path) -> None:
    k, m = 1 << 10, 1 << 20
    honest = sized(b"Conv", kernel_shape=[14, 14], strides=[14, 14], pads=[3, 3, 3, 3], dilations=[1, 1])
    check(tmp_path, graph(honest, sized(b"Slice", starts=[0], ends=[2**63 - 1]), sized(b"RandomNormal", shape=[k, k])))
    for bad in (
        sized(b"RandomNormal", shape=[m, m]),
        sized(b"Conv", pads=[m, m, 0, 0]),
        sized(b"Pad", pads=[2**64 - m, 0, m, 0, m, 0]),  # one more than pairs has, one that crops
        sized(b"ConvTranspose", strides=[k, k], output_padding=[k, k]),
        sized(b"RoiAlign", output_height=[k], output_width=[k], sampling_ratio=[k]),
        text(1, text(4, b"Upsample") + text(5, text(1, b"scales") + varint(7 << 3 | 5) + struct.pack("<f", 1e10))),
    ):
        with pytest.raises(BadInput, match="elements"):
            check(tmp_path, graph(bad))


def test_shapes_that_stand_elsewhere_size_nothing(tmp_path: Path) -> None:
    name = text(8, b"n")  # the last one counts
    check(tmp_path, initializer(tensor(b"a.data") + name))
    with pytest.raises(BadInput, match="Expand makes inf"):
        check(tmp_path, graph(text(5, tensor(b"a.data") + name), node(b"Expand", b"x", b"n")))
    sparse = text(1, text(2, b"n") + text(4, b"Constant") + text(5, text(1, b"sparse_value") + text(22, whole(3, 4))))
    with pytest.raises(BadInput, match="Expand makes inf"):
        check(tmp_path, graph(sparse, node(b"Expand", b"x", b"n")))


def test_tensors_larger_than_their_bytes(tmp_path: Path) -> None:
    check(tmp_path, initializer(whole(1, 2) + whole(2, 22) + text(9, b"\x21")))  # two of four bits
    with pytest.raises(BadInput, match=r"has 1\d bytes"):
        check(tmp_path, initializer(whole(1, 1 << 40) + whole(2, 1) + text(9, b"1234")))
    with pytest.raises(BadInput, match="sparse tensor is of the shape"):
        check(tmp_path, graph(text(15, whole(3, 1 << 20) + whole(3, 1 << 20))))
    with pytest.raises(BadInput, match=r"of the shape \[1\] has 65 numbers"):  # one counts, which?
        check(tmp_path, initializer(numbers(b"n", [1], raw=True) + whole(7, 1) * 65))


def test_messages_that_protobuf_would_make_one_of(tmp_path: Path) -> None:
    """Four numbers that the file holds, and in the second half another axis."""
    half, rest = tensor(b"a.data"), whole(1, 1 << 20)
    for bad in (
        graph(text(1, text(4, b"Constant") + text(5, text(5, half) + text(5, rest)))),
        graph(text(15, text(1, half) + text(1, rest))),
        initializer(half) + graph(),
    ):
        with pytest.raises(BadInput, match="stands twice"):
            check(tmp_path, bad)


def test_links_before_dots(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no file of the manifest"):
        check(tmp_path, initializer(tensor(b"link/../a.data")))


def test_compiled_engines_in_files_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="compiled engine"):
        check(tmp_path, graph(text(1, text(4, b"EPContext"))))


def test_more_fields_than_any_graph_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MOST_FIELDS", 100)
    with pytest.raises(BadInput, match="more than 100 fields"):
        check(tmp_path, whole(1, 9) * 101)


@pytest.mark.parametrize("data", [b"", b"\x08\x07 nothing", b"\xff" * 20, b"\x3a\xff\xff\xff\xff\x0f", b"\x0b\x0c"])
def test_no_graph(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(BadInput, match="no graph that can be run"):
        check(tmp_path, data)
