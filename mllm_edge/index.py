"""Makes indexes of pictures and adds to them. `runtime/answers/index.py` reads them and says what their files are.

An index grows in `<name>.partial`. After each batch its vectors and lines are there; what a kill leaves is cut to whole
items, and the same command goes on behind them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mllm_edge.bundle.check import is_inside
from mllm_edge.bundle.read import sha256
from mllm_edge.errors import BadInput
from mllm_edge.growing import Growing, Kind
from mllm_edge.machine.threads import usable_cores
from mllm_edge.places import writing
from mllm_edge.runtime.answers.index import ABOUT, AGAIN, ITEMS, SCHEMA, SKIPPED, VECTORS, About, Index, npy_header
from mllm_edge.runtime.embedding import Embedder, Prepared
from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.runtime.images import load_image
from mllm_edge.version import __version__

log = logging.getLogger(__name__)

KIND = Kind("an index of pictures", ABOUT, "unfinished index", "replaced index")
PROGRESS = "progress.json"
FILES = (VECTORS, ITEMS, SKIPPED)
SUFFIXES = (".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
AHEAD = 2  # batches that are read while one is embedded


class Item(NamedTuple):
    """A file: its path relative to a folder of pictures, and that folder's number."""

    file: str
    root: int


@dataclass(frozen=True)
class Made:
    """What was made: the index, how many pictures it has, how many of them are new, and the lines of its
    `skipped.jsonl`, [path, folder, reason]."""

    folder: Path
    pictures: int
    added: int
    skipped: list[tuple[str, str, str]]


Progress = Callable[[float], None]  # the share that is done


def build(
    embedder: Embedder, folders: Sequence[Path], out: Path, force: bool = False, report: Progress = lambda _: None
) -> Made:
    """Embed the pictures of folders, with those below them, as a new index.

    Files that are no pictures, or whose vector has no direction, are skipped with a warning each. Hidden files, and
    those whose names do not end as pictures' do (`SUFFIXES`), are not looked at.

    Args:
        embedder: what makes the vectors.
        folders: where the pictures are; they stay there.
        out: the index's folder, which appears when it is complete. Until then the same call goes on where one was cut
            off.
        force: replace an index that is there.
        report: called with the share that is done.

    Raises:
        BadInput: a folder is missing or has no pictures that can be read, or `out` is taken.
        MllmEdgeError: a stage fails, or the disk is full.
    """
    _check_folders(folders)
    with Growing(out, force, KIND) as place:
        return _filled(place, embedder, folders, None, report)


def add(embedder: Embedder, index: Path, folders: Sequence[Path], report: Progress = lambda _: None) -> Made:
    """Embed the pictures of folders that an index has not yet; the old one stays until the new one is complete.

    Raises:
        BadInput: it is no index, or one of another model; see `build`.
        MllmEdgeError: see `build`.
    """
    _check_folders(folders)
    old = Index(index)
    old.require(embedder.made_by)
    with Growing(index, True, KIND) as place:
        return _filled(place, embedder, folders, old.about, report)


def _filled(place: Growing, embedder: Embedder, folders: Sequence[Path], old: About | None, report: Progress) -> Made:
    with contextlib.closing(_Writer(place, embedder, folders, old)) as writer:
        waiting, done = writer.waiting(folders), 0
        if before := len(writer) - (old.count if old else 0):
            log.info("going on behind %d pictures that are embedded already", before)
        for batch in _read(waiting, embedder, writer.roots):
            good = [(item, read) for item, read in batch if not isinstance(read, str)]
            vectors = embedder.vectors([read.pixels for _, read in good])
            whole = [bool(np.isfinite(vector).all()) for vector in vectors]
            writer.append(vectors[whole], [(*item, read.digest) for (item, read), ok in zip(good, whole) if ok])
            lost = [(item, read) for item, read in batch if isinstance(read, str)]
            lost += [(item, "its vector has no direction") for (item, _), ok in zip(good, whole) if not ok]
            writer.skip(lost)
            done += len(batch)
            report(done / len(waiting))
        if not len(writer):
            where = " and ".join(map(str, folders))
            names = ", ".join(SUFFIXES)
            raise BadInput(f"{where} has no picture that can be read (names end in {names}); give another folder")
        return Made(writer.publish(), len(writer), len(writer) - (old.count if old else 0), list(writer.skipped()))


class _Read(NamedTuple):
    pixels: Prepared
    digest: str


def _read(items: Sequence[Item], embedder: Embedder, roots: Sequence[str]) -> Iterator[list[tuple[Item, _Read | str]]]:
    """Batches of files as the stages read them, or why one cannot be read; the next are read meanwhile."""

    def one(item: Item) -> _Read | str:
        path = Path(roots[item.root], item.file)
        if not is_inside(path, Path(roots[item.root])):
            return f"{path} is a link out of its folder"
        try:
            return _Read(embedder.prepare(load_image(path)), sha256(path))
        except (BadInput, OSError) as error:
            return str(error)

    batches = [items[start : start + embedder.batch] for start in range(0, len(items), embedder.batch)]
    ahead: deque[list[tuple[Item, Future[_Read | str]]]] = deque()
    pool = ThreadPoolExecutor(usable_cores(), "pictures")
    try:
        for batch in batches:
            ahead.append([(item, pool.submit(one, item)) for item in batch])
            if len(ahead) > AHEAD:
                yield [(item, future.result()) for item, future in ahead.popleft()]
        while ahead:
            yield [(item, future.result()) for item, future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


class _Writer:
    """The files of an index that grows.

    Attributes:
        roots: the folders of pictures, links followed.
    """

    def __init__(self, place: Growing, embedder: Embedder, folders: Sequence[Path], old: About | None):
        self._place, self._embedder, self._folder = place, embedder, place.folder
        self._home = os.path.realpath(place.final)
        self.roots = [os.path.realpath(Path(self._home, root)) for root in (old.roots if old else [])]
        self._prefixes = [self._root_of(folder) for folder in folders]
        made_from = {
            "made_by": embedder.made_by,
            "roots": self.roots,
            "folders": self._prefixes,
            "old": sha256(place.final / ITEMS) if old else "",
        }
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        with writing(self._folder):
            if self._progress() != key:
                self._begin(old is not None)
                (self._folder / f".{PROGRESS}").write_text(json.dumps(key), encoding="utf-8")
                (self._folder / f".{PROGRESS}").replace(self._folder / PROGRESS)
            self._known = self._whole()
            self._known |= {self._path(file, root) for file, root, _ in self._lines(SKIPPED)}
            self._streams: dict[str, BinaryIO] = {name: (self._folder / name).open("ab") for name in FILES}

    def __len__(self) -> int:
        return self._count

    def waiting(self, folders: Sequence[Path]) -> list[Item]:
        """The files of the folders that are neither in the index nor skipped, each once."""
        found: dict[str, Item] = {}
        for folder, (root, prefix) in zip(folders, self._prefixes):
            for file in _pictures(folder):
                item = Item(str(Path(prefix, file)), root)
                path = self._path(*item)
                if path not in self._known and path not in found:
                    found[path] = item
        self._known.clear()  # a name for each picture
        return list(found.values())

    def append(self, vectors: Floats, items: Sequence[tuple[str, int, str]]) -> None:
        """Write vectors [n,d], then their lines: a line says that its vector is there."""
        self._write(VECTORS, vectors.astype("<f4").tobytes())
        self._write(ITEMS, _text(items))
        self._count += len(items)

    def skip(self, lost: Sequence[tuple[Item, str]]) -> None:
        """List files that are no pictures."""
        for item, reason in lost:
            path = self._path(*item)
            warnings.warn(f"skipped {'' if path in reason else path + ': '}{reason}", RuntimeWarning, stacklevel=2)
        self._write(SKIPPED, _text([(*item, reason) for item, reason in lost]))

    def skipped(self) -> Iterator[tuple[str, str, str]]:
        """The files that are listed so, with their folder and why."""
        with (self._place.final / SKIPPED).open("rb") as stream:
            for line in stream:
                file, root, reason = json.loads(line)
                yield file, self.roots[root], reason

    def publish(self) -> Path:
        """Give the index its name."""
        self.close()
        home = [os.path.relpath(root, self._home) for root in self.roots]
        about = About(SCHEMA, self._embedder.made_by, self._embedder.width, self._count, home, __version__)
        with writing(self._folder):
            with (self._folder / VECTORS).open("r+b") as stream:
                stream.write(_header(self._count, self._embedder.width))
            text = json.dumps(dataclasses.asdict(about), indent=2)
            (self._folder / ABOUT).write_text(text + "\n", encoding="utf-8")
            return self._place.publish(FILES)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _write(self, name: str, data: bytes) -> None:
        with writing(self._folder):
            self._streams[name].write(data)
            self._streams[name].flush()

    def _path(self, file: str, root: int) -> str:
        return str(Path(self.roots[root], file))

    def _root_of(self, folder: Path) -> tuple[int, str]:
        """The number of the folder of pictures that holds this one, which may be this one itself, and the way there."""
        real = os.path.realpath(folder)
        for number, root in enumerate(self.roots):
            if os.path.commonpath([root, real]) == root:
                way = os.path.relpath(real, root)
                return number, "" if way == os.curdir else way
        self.roots.append(real)
        return len(self.roots) - 1, ""

    def _progress(self) -> Any:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self._folder / PROGRESS).read_text(encoding="utf-8"))
        return None

    def _begin(self, from_old: bool) -> None:
        """No picture yet, or those of the old index; what it skipped in these folders is tried again."""
        (self._folder / PROGRESS).unlink(missing_ok=True)
        (self._folder / SKIPPED).write_bytes(b"")
        if not from_old:
            (self._folder / VECTORS).write_bytes(_header(0, self._embedder.width))
            (self._folder / ITEMS).write_bytes(b"")
            return
        for name in (VECTORS, ITEMS):
            shutil.copyfile(self._place.final / name, self._folder / name)
        if (self._place.final / SKIPPED).is_file():
            again = tuple(self._path(way, root) + os.sep for root, way in self._prefixes)
            lines = _parsed(self._place.final / SKIPPED, len(self.roots))
            kept = [line for line in lines if not self._path(line[0], line[1]).startswith(again)]
            (self._folder / SKIPPED).write_bytes(_text(kept))

    def _whole(self) -> set[str]:
        """Cut what a kill left to whole items; returns their files."""
        vectors, items, width = self._folder / VECTORS, self._folder / ITEMS, 4 * self._embedder.width
        with vectors.open("rb") as stream:
            npy_header(stream, vectors)
            start = stream.tell()
        rows = (vectors.stat().st_size - start) // width
        known, count, end = set[str](), 0, 0
        with items.open("rb") as stream:
            for line in stream:
                if count == rows or not line.endswith(b"\n"):
                    break
                file, root, _ = _item(line, items, len(self.roots))
                known.add(self._path(file, root))
                count, end = count + 1, end + len(line)
        os.truncate(items, end)
        os.truncate(vectors, start + width * count)
        self._count = count
        return known

    def _lines(self, name: str) -> list[tuple[str, int, str]]:
        """The lines of a file, which is cut to whole ones."""
        path = self._folder / name
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)
        return _parsed(path, len(self.roots))


def _check_folders(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder} is no folder; give one that has pictures")


def _pictures(folder: Path) -> Iterator[str]:
    """The files below a folder that are named as pictures are, in order."""

    def unread(error: OSError) -> None:
        warnings.warn(f"skipped {error.filename} ({error.strerror})", RuntimeWarning, stacklevel=2)

    for place, folders, files in os.walk(folder, onerror=unread):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.relpath(Path(place, name), folder)


def _header(count: int, width: int) -> bytes:
    """Of a `.npy` file of float32 [count,width]; as long for any count, as numpy leaves room for it."""
    stream = io.BytesIO()
    shape = {"descr": "<f4", "fortran_order": False, "shape": (count, width)}
    np.lib.format.write_array_header_1_0(stream, shape)
    return stream.getvalue()


def _text(lines: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(line).encode("ascii") + b"\n" for line in lines)


def _parsed(path: Path, roots: int) -> list[tuple[str, int, str]]:
    with path.open("rb") as stream:
        return [_item(line, path, roots) for line in stream]


def _item(line: bytes, path: Path, roots: int) -> tuple[str, int, str]:
    """A line of an index. Raises BadInput where it is none."""
    try:
        file, root, text = json.loads(line)
        if isinstance(file, str) and isinstance(text, str) and type(root) is int and 0 <= root < roots:
            return file, root, text
    except (ValueError, TypeError, RecursionError):
        pass
    raise BadInput(f"{path} has a line that is no item ({line[:40]!r}); {AGAIN}")
