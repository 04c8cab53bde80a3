"""An index of pictures: their vectors in a file that is mapped and not read, and where the pictures are.

A folder with

- `index.json`: what made the vectors, how many there are, and the folders that hold the pictures;
- `vectors.npy`: float32 [N,d] of length 1. float32, because numpy multiplies it where it is mapped; float16 would halve
  the disk, but each search would convert it, which takes longer than to read twice as much (`benchmarks/retrieval.py`);
- `items.jsonl`: N lines `[path, folder, SHA-256]`, the path relative to one of the folders;
- `skipped.jsonl`: lines `[path, folder, reason]` of files that are no pictures.

It comes from anywhere: nothing is unpickled, sizes are compared before anything is mapped, a line is read when its
picture is wanted. A picture is used only where its file is still the one that was embedded, so an index cannot make us
show a file that its author has not seen.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mllm_edge.bundle.answers import RetrievedAnswer
from mllm_edge.bundle.check import is_inside, is_path
from mllm_edge.bundle.manifest import Manifest
from mllm_edge.bundle.read import graph_of, read_text, sha256
from mllm_edge.bundle.sources import Constant, Pixels
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.runtime.images import MAX_BYTES
from mllm_edge.runtime.wiring import needed_for
from mllm_edge.typed_json import typed

SCHEMA = 1
ABOUT, VECTORS, ITEMS, SKIPPED = "index.json", "vectors.npy", "items.jsonl", "skipped.jsonl"
MOST_WIDTH = 1 << 16
MOST_ITEMS = 1 << 31
LONGEST_LINE = 1 << 16  # bytes of an item; a path has at most 4096
BLOCK = 4 << 20  # bytes of vectors that are multiplied at once; what stays of a block are its few best
MOST_GONE = 1000  # pictures whose files are gone or changed, before a search gives up
# As numpy writes it (numpy.lib.format, version 1.0), not all that it reads: that is Python, with all of its errors.
_HEADER = re.compile(
    rb"\{'descr': '([<>=|]?[A-Za-z]\d{0,3})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,12}(?:, \d{1,12})*,?)?)\), \} *\n"
)
AGAIN = "make it again with: mllm-edge index build"


@dataclass(frozen=True)
class About:
    """What `index.json` says. `made_by` names what made the vectors (`fingerprint`); `roots` are the pictures' folders,
    relative to the index."""

    schema: int
    made_by: str
    width: int
    count: int
    roots: list[str]
    tool_version: str = ""


class Found(NamedTuple):
    """A picture's file, and the cosine of its vector and what was looked for."""

    path: Path
    score: float


def retrieving(manifest: Manifest) -> RetrievedAnswer:
    """The bundle's answer that retrieves. Raises BadInput where it has none."""
    for entry in manifest.answers:
        if isinstance(entry, RetrievedAnswer):
            return entry
    can = ", ".join(manifest.tasks)
    raise BadInput(f"this bundle ({can}) retrieves no pictures; use one that does, or leave the index out")


def fingerprint(manifest: Manifest) -> str:
    """What names the vectors that a bundle makes of pictures: a hash of the stages that lead there and of what they
    read; "" where it makes none."""
    picture = retrieving(manifest).picture
    needed = needed_for([picture], manifest.stages)
    stages = [entry for entry in manifest.stages if entry.name in needed]
    read = {spec.name for stage in stages for spec in stage.inputs}
    sources = [asdict(one) for one in manifest.sources if isinstance(one, (Pixels, Constant)) and one.name in read]
    made_by = {"tensor": picture, "stages": [graph_of(stage) for stage in stages], "sources": sources}
    return hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest() if picture else ""


class Index:
    """An index that is searched; see the module for its files.

    Attributes:
        folder: where it is.
        about: what it says of itself.

    Raises:
        BadInput: it is none, or its files do not fit each other.
    """

    def __init__(self, folder: Path):
        self.folder, self.about = folder, read_about(folder)
        if not self.about.count:
            raise BadInput(f"the index {folder} is empty; {AGAIN}")
        self._vectors = open_vectors(folder, self.about)
        self._lines = _Lines(folder / ITEMS, self.about.count)

    def check(self, manifest: Manifest) -> None:
        """Raise BadInput where this bundle retrieves nothing, or its stages make other vectors."""
        if expected := fingerprint(manifest):
            self.require(expected)

    def require(self, made_by: str) -> None:
        """Raise BadInput where other stages than these made the vectors (`fingerprint`)."""
        if made_by != self.about.made_by:
            raise BadInput(
                f"the index {self.folder} was made by another model (or another export of it), with vectors of "
                f"{self.about.width} values; make this bundle's own with: mllm-edge index build"
            )

    def search(self, query: Floats, most: int) -> list[tuple[int, float]]:
        """Numbers and cosines of the `most` vectors nearest to `query` [d], the nearest first; of equals the first.

        Exact: one product over all vectors, in blocks. A vector with not-a-numbers is never near.

        Raises:
            BadInput: the query has another width.
            MllmEdgeError: the query has no direction.
        """
        if query.shape != (self.about.width,):
            raise BadInput(
                f"the index {self.folder} has vectors of {self.about.width} values, this bundle's have "
                f"{query.shape[-1]}; make its own index"
            )
        length = float(np.linalg.norm(query.astype(np.float64)))
        if not 0 < length < np.inf:
            raise MllmEdgeError("what is looked for has no direction (its vector is zero or not finite); ask otherwise")
        unit = (query / length).astype(np.float32)
        rows = max(1, BLOCK // (4 * self.about.width))
        scores, numbers = np.empty(0, np.float32), np.empty(0, np.int64)
        for start in range(0, self.about.count, rows):
            block = self._vectors[start : start + rows] @ unit  # [rows]
            least = scores[-1] if len(scores) == most else -np.inf
            better = np.flatnonzero((block > least) & (block < np.inf))  # none of equals: those before them are kept
            scores, numbers = np.concatenate([scores, block[better]]), np.concatenate([numbers, start + better])
            if len(scores) > most:  # a sort of the few that can be among them
                able = scores >= np.partition(scores, -most)[-most]
                scores, numbers = scores[able], numbers[able]
            kept = np.argsort(-scores, kind="stable")[:most]
            scores, numbers = scores[kept], numbers[kept]
        return [(int(number), float(score)) for number, score in zip(numbers, scores)]

    def nearest(self, query: Floats, most: int = 1) -> list[Found]:
        """The `most` pictures nearest to `query` [d] whose files are still those that were embedded. For others, which
        a warning counts, the next are taken.

        Raises:
            BadInput: none is left, or an item points outside its folder; see `search`.
            MllmEdgeError: see `search`.
        """
        found: list[Found] = []
        gone: list[Path] = []
        ranked: list[tuple[int, float]] = []
        while len(found) < most and len(ranked) < self.about.count and len(gone) <= MOST_GONE:
            seen, ranked = len(ranked), self.search(query, max(most, 4 * len(ranked)))
            if len(ranked) <= seen:
                break
            for number, score in ranked[seen:]:
                path, digest = self.item(number)
                if len(found) < most and is_file_of(path, digest):
                    found.append(Found(path, score))
                elif len(found) < most:
                    gone.append(path)
        if gone and found:
            warnings.warn(
                f"{len(gone)} nearer pictures of the index {self.folder} are gone or changed, the first is {gone[0]}; "
                "put them back or make it again",
                stacklevel=2,
            )
        if not found:
            why = f"{gone[0]} and others are gone or changed" if gone else "its vectors are not numbers"
            raise BadInput(f"the index {self.folder} leads to no picture ({why}); put them back or {AGAIN}")
        return found

    def item(self, number: int) -> tuple[Path, str]:
        """The file of a picture, and the SHA-256 that it had. Raises BadInput where the line says no such thing."""
        return self._lines.item(number, [self.folder / root for root in self.about.roots])


def is_file_of(path: Path, digest: str) -> bool:
    """Whether an ordinary file is there with that SHA-256."""
    try:
        return path.is_file() and path.stat().st_size <= MAX_BYTES and sha256(path) == digest
    except OSError:
        return False


def read_about(folder: Path) -> About:
    """What an index says of itself. Raises BadInput where it is none."""
    if folder.is_file():
        raise BadInput(f"{folder} is a file, an index is a folder (pickled ones are programs and not read); {AGAIN}")
    where = folder / ABOUT
    if not where.is_file():
        raise BadInput(f"{folder} is no index of pictures (it has no {ABOUT}); {AGAIN}")
    try:
        document = json.loads(read_text(where, 1 << 20))
        about: About = typed(About, document, str(where))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} is not valid JSON ({error}); {AGAIN}") from None
    except BadInput as error:
        raise BadInput(f"{str(error).partition(';')[0]}; {AGAIN}") from None
    if about.schema != SCHEMA:
        raise BadInput(f"{where} has schema {about.schema}, this version reads {SCHEMA}; {AGAIN}")
    if not 1 <= about.width <= MOST_WIDTH or not 0 <= about.count <= MOST_ITEMS or len(about.roots) > 1000:
        raise BadInput(f"{where} speaks of {about.count} vectors of {about.width} values, which cannot be; {AGAIN}")
    if not all(map(is_path, about.roots)):
        raise BadInput(f"{where} names a folder that no system can have; {AGAIN}")
    return about


def open_vectors(folder: Path, about: About) -> NDArray[np.float32]:
    """The vectors float32 [N,d], mapped. Raises BadInput where the file is not what its header and `about` say."""
    path, shape = _own_file(folder, VECTORS), (about.count, about.width)
    with path.open("rb") as stream:
        found = npy_header(stream, path)
        start, size = stream.tell(), path.stat().st_size
    if found != (shape, False, np.dtype("<f4")):
        raise BadInput(f"{path} holds {found[2]} {list(found[0])} where {ABOUT} has <f4 {list(shape)}; {AGAIN}")
    if size != (promised := start + 4 * about.count * about.width):
        raise BadInput(f"{path} has {size} bytes, not the {promised} of its shape; {AGAIN}")
    return np.memmap(path, "<f4", "r", start, shape)


def npy_header(stream: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns come first, and type of a `.npy` file. Raises BadInput where it has no such header, or
    holds Python objects."""
    start = stream.read(10)
    found = _HEADER.fullmatch(stream.read(int.from_bytes(start[8:], "little")))
    try:
        if start[:8] != b"\x93NUMPY\x01\x00" or not found:
            raise TypeError("it has another header")
        dtype = np.dtype(found[1].decode("ascii"))
    except TypeError as error:
        raise BadInput(f"{path} is no array ({error}); {AGAIN}") from None
    if dtype.hasobject:
        raise BadInput(f"{path} holds Python objects, which are programs and not read; {AGAIN}")
    return tuple(map(int, re.findall(rb"\d+", found[3]))), found[2] == b"True", dtype


class _Lines:
    """The lines of a mapped file, each read when it is asked for."""

    def __init__(self, path: Path, count: int):
        self._path = _own_file(path.parent, path.name)
        try:
            with self._path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError) as error:  # an empty file cannot be mapped
            raise BadInput(f"{path} cannot be read ({error}); {AGAIN}") from None
        if len(self._data) < count:
            raise BadInput(f"{path} is not {count} lines, as {ABOUT} has it; {AGAIN}")
        self._ends, lines = np.empty(count, np.int64), 0
        for start in range(0, len(self._data), BLOCK):
            ends = start + np.flatnonzero(np.frombuffer(self._data[start : start + BLOCK], np.uint8) == ord("\n"))
            lines += len(ends)
            if lines > count:
                break
            self._ends[lines - len(ends) : lines] = ends
        if lines != count or self._ends[-1] != len(self._data) - 1:
            raise BadInput(f"{path} is not {count} lines, as {ABOUT} has it; {AGAIN}")

    def item(self, number: int, roots: list[Path]) -> tuple[Path, str]:
        start, end = int(self._ends[number - 1]) + 1 if number else 0, int(self._ends[number])
        try:
            file, root, digest = json.loads(self._data[start : min(end, start + LONGEST_LINE)])
            if not (isinstance(file, str) and isinstance(digest, str) and type(root) is int and 0 <= root < len(roots)):
                raise ValueError("not a path, a folder and a hash")
        except (ValueError, TypeError, RecursionError) as error:
            raise BadInput(f"{self._path}: line {number + 1} is no item ({error}); {AGAIN}") from None
        path = roots[root] / file
        named = Path(file)
        if not is_path(file) or named.is_absolute() or ".." in named.parts or not is_inside(path, roots[root]):
            raise BadInput(f"{self._path} points outside its folder of pictures ({file[:80]!r}); do not use this index")
        return path, digest


def _own_file(folder: Path, name: str) -> Path:
    """A file of an index. Raises BadInput where it is missing, no ordinary file, or a link out of the folder."""
    path = folder / name
    if not path.is_file():
        raise BadInput(f"{path} is missing, or no ordinary file; {AGAIN}")
    if not is_inside(path, folder):
        raise BadInput(f"{path} is a link out of its folder; do not use this index")
    return path
