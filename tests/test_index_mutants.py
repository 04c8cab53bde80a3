"""Indexes of pictures with cut, turned and strange bytes: one that is read, or one line, and little memory."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from eye_bundle import photographs, write_bundle
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mllm_edge import index as indexing
from mllm_edge.bundle.read import sha256
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answers.index import Index
from mllm_edge.runtime.embedding import Embedder

FILES = ("index.json", "vectors.npy", "items.jsonl")
PICTURES = 7
MOST_MEMORY = 8 << 20  # bytes; a block of vectors is half of it
STRANGE = [b"", b"\0", b"\n", b"\xff", b'"', b"{", b"}", b"[", b"]", b"(", b")", b",", b":", b"-", b"9" * 30, b"1e999"]
STRANGE += [b"\\ud800", b"../", b"/etc/passwd", b"null", b"NaN", b"'", b"#", b"\\", b"O", b"[" * 3000]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("eye") / "eye.bundle")


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos = photographs(tmp_path_factory.mktemp("home") / "photos", range(PICTURES))
    with Embedder(bundle, threads=1) as embedder:
        return indexing.build(embedder, [photos], photos.with_name("photos.index")).folder


@st.composite
def mutants(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cuts, turned bytes, and strange ones in the place of some; half of them where a header stands."""
    changes = draw(
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4), st.sampled_from(STRANGE)), min_size=1, max_size=3)
    )
    near, kind = draw(st.booleans()), draw(st.sampled_from(["cut", "turn", "put"]))
    bit = 1 << draw(st.integers(0, 7))

    def mutant(data: bytes) -> bytes:
        if kind == "cut":
            return data[: int(changes[0][0] * len(data))]
        for place, count, put in changes:
            at = int(place * (min(len(data), 128) if near else len(data) - 1))
            new = bytes([data[at] ^ bit]) if kind == "turn" and at < len(data) else put
            data = data[:at] + new + data[at + (1 if kind == "turn" else count) :]
        return data

    return mutant


def tried(index: Path, query: np.ndarray) -> Index | None:
    """The index, of which all that can be asked was; None where it is refused. Raises whatever else comes."""
    tracemalloc.start()
    try:
        found = Index(index)
        for each in found.nearest(query, 3):
            assert each.path.resolve().is_relative_to(index.parent / "photos")
        for number in range(found.about.count):
            path, digest = found.item(number)
            assert isinstance(digest, str) and ".." not in path.relative_to(index / found.about.roots[0]).parts
        return found
    except BadInput:
        return None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MOST_MEMORY


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FILES), mutants())
@example("vectors.npy", lambda data: data.replace(b"}", b" "))  # a header that does not end
@example("vectors.npy", lambda data: data.replace(b"(7, ", b"(1e9999, "))
@example("vectors.npy", lambda data: data.replace(b"'<f4'", b"()   "))
@example("vectors.npy", lambda data: data[:8] + b"\xff\xff" + data[10:].replace(b"7, 6", b"9" * 65_000))
@example("items.jsonl", lambda data: data.replace(b"0.png", b"\\ud800"))  # half a character
@example("index.json", lambda data: data.replace(b"../photos", b"../\\ud800"))
@example("index.json", lambda data: data.replace(b'"count": 7', b'"count": true'))
def test_a_mutant_is_read_or_refused(whole: Path, file: str, mutant: Callable[[bytes], bytes]) -> None:
    query = np.load(whole / "vectors.npy")[2]
    index = whole.with_name("mutant.index")
    shutil.rmtree(index, ignore_errors=True)
    shutil.copytree(whole, index)
    before = (index / file).read_bytes()
    (index / file).write_bytes(mutant(before))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pictures whose hash is another are said to have changed
        found = tried(index, query)
    if (index / file).read_bytes() == before:
        assert found is not None and found.nearest(query)[0].score == pytest.approx(1, abs=1e-6)
    if found is not None and file != "index.json":
        assert (found.about.count, found.about.width) == (PICTURES, query.shape[0])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*FILES, "skipped.jsonl"]), mutants())
def test_a_mutant_is_added_to_or_refused(
    bundle: Path, whole: Path, file: str, mutant: Callable[[bytes], bytes]
) -> None:
    index = whole.with_name("grown.index")
    for place in (index, index.with_name("grown.index.partial")):
        shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, index)
    (index / "skipped.jsonl").write_text('["0.gif", 0, "no picture"]\n')
    (index / file).write_bytes(mutant((index / file).read_bytes()))
    before = {each.name: sha256(each) for each in index.iterdir()}
    with Embedder(bundle, threads=1) as embedder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = indexing.add(embedder, index, [whole.with_name("photos")])
        except BadInput:
            assert {each.name: sha256(each) for each in index.iterdir()} == before  # the old one stays
            return
    assert made.pictures >= made.added


def test_a_sparse_file_takes_no_memory(whole: Path, tmp_path: Path) -> None:
    """4 TB that are nothing but a size, with the lines of seven."""
    index = tmp_path / "sparse.index"
    shutil.copytree(whole, index)
    about = json.loads((index / "index.json").read_text())
    count = 1 << 30
    (index / "index.json").write_text(json.dumps({**about, "count": count}))
    header = (index / "vectors.npy").read_bytes()[:128].replace(b"(7, ", b"(1073741824, ")[:127] + b"\n"
    (index / "vectors.npy").write_bytes(header)
    os.truncate(index / "vectors.npy", 128 + 4 * about["width"] * count)
    assert tried(index, np.ones(about["width"], np.float32)) is None
