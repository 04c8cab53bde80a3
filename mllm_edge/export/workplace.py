"""The folder in which a bundle is built: `<name>.partial`, beside its final name, until everything is verified.

It carries a mark of ours, without which it is not touched. The lock is the system's and ends with its process, in
whatever container that ran.
Each finished step is recorded in `progress.json` with a key of all its inputs, so that a second run after a crash, a
full disk or Ctrl-C redoes only steps that are missing or whose inputs changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_edge.bundle.manifest import MANIFEST
from mllm_edge.bundle.read import file_entry, sha256
from mllm_edge.bundle.sources import FileEntry
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.places import FULL, MARK, claim, is_ours, mark, no_link, writing

PROGRESS = "progress.json"
UNFINISHED, REPLACED = "unfinished export", "replaced bundle"  # marks of `.partial` and `.old`


@dataclass(frozen=True)
class Finished:
    """A step's files, and other results to keep (JSON values)."""

    files: list[FileEntry]
    details: dict[str, Any] = field(default_factory=dict)


class Workplace:
    """One export's folder on disk. A context manager that holds the lock on the final name.

    Attributes:
        folder: the build folder.
    """

    def __init__(self, final: Path, force: bool):
        if final.name in ("", ".."):
            raise BadInput(f"-o {final} has no name of its own; give the bundle's folder one, as {final / 'my.bundle'}")
        self.final = final
        self.folder = _beside(final, "partial")
        self._force = force
        self._old = _beside(final, "old")
        self._lock = _beside(final, "lock")

    def __enter__(self) -> Workplace:
        """Take the lock and make the folder.

        Raises:
            BadInput: another export is writing there, the final name is taken, or a place is not ours or cannot be.
        """
        with writing(self.final.parent):
            self.final.parent.mkdir(parents=True, exist_ok=True)
        self._locked = self._take_lock()
        try:
            no_link(self.final)
            if is_ours(self._old, REPLACED) and not self.final.exists():
                self._put_back()  # a process died between the two renames of `publish`
            self._check_final()
            claim(self.folder, UNFINISHED)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.unlink(missing_ok=True)
        os.close(self._locked)

    def step(self, name: str, made_from: dict[str, Any], build: Callable[[], Finished]) -> Finished:
        """The result of `build`, or of an earlier run of it with the same inputs whose files are intact."""
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=repr).encode()).hexdigest()
        progress = self._progress()
        earlier = progress.get(name)
        if earlier and earlier["key"] == key:
            finished = Finished([FileEntry(**entry) for entry in earlier["files"]], earlier["details"])
            if all(self._intact(entry) for entry in finished.files):
                return finished
        finished = build()
        self._write_progress({**progress, name: {"key": key, **dataclasses.asdict(finished)}})
        return finished

    def entry(self, path: Path) -> FileEntry:
        """Size and hash of a file in `folder`."""
        return file_entry(self.folder, path.relative_to(self.folder).as_posix())

    def need(self, size: int, what: str) -> None:
        """Raise MllmEdgeError unless `size` bytes are free on the bundle's disk."""
        free = shutil.disk_usage(self.final.parent).free
        if free < size:
            raise MllmEdgeError(
                f"{what} needs {size / 1e9:.1f} GB but {self.final.parent} has {free / 1e9:.1f} GB free; "
                "make room or choose another disk with -o"
            )

    def publish(self, files: Iterable[FileEntry]) -> Path:
        """Give the folder its final name; files other than the manifest and `files` are deleted."""
        keep = {MANIFEST, MARK, *(entry.file for entry in files)}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and not any(path.iterdir()):
                path.rmdir()
            elif not is_folder and path.relative_to(self.folder).as_posix() not in keep:
                path.unlink()
        self._forget_old()
        try:
            if self.final.exists():
                mark(self.final, REPLACED)
                self.final.rename(self._old)
            self.folder.rename(self.final)
        finally:
            if is_ours(self._old, REPLACED) and not self.final.exists():
                self._put_back()
        (self.final / MARK).unlink()
        self._forget_old()
        return self.final

    def _put_back(self) -> None:
        self._old.rename(self.final)
        (self.final / MARK).unlink()

    def _forget_old(self) -> None:
        if is_ours(self._old, REPLACED):
            shutil.rmtree(self._old)

    def _check_final(self) -> None:
        if not self.final.exists() or (self.final.is_dir() and not any(self.final.iterdir())):
            return
        if not (self.final / MANIFEST).is_file():
            raise BadInput(f"{self.final} exists and is not a bundle; choose another name with -o")
        if not self._force:
            raise BadInput(f"{self.final} exists; use --force to replace it or choose another name with -o")
        if self._old.exists() and not is_ours(self._old, REPLACED):
            raise BadInput(f"{self._old} is not ours, and the replaced bundle would be moved there; move it away first")

    def _take_lock(self) -> int:
        """Lock the file beside the final name; returns its descriptor."""
        no_link(self._lock)
        with writing(self._lock):
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if os.read(lock, 20).strip(b"0123456789"):  # locks of before hold a process number
                raise BadInput(f"{self._lock} is no lock of ours; move it away or choose another name with -o")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its last holder may have deleted the file between our two steps.
                taken = self._lock.exists() and os.path.samestat(os.fstat(lock), self._lock.stat())
            except BlockingIOError:
                taken = False
            except OSError as error:
                raise BadInput(
                    f"{self._lock} cannot be locked ({error.strerror}); choose another disk with -o"
                ) from None
            if not taken:
                raise BadInput(f"another process is exporting to {self.final}; wait for it")
            return lock
        except BaseException:
            os.close(lock)
            raise

    def _progress(self) -> dict[str, Any]:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            progress: dict[str, Any] = json.loads((self.folder / PROGRESS).read_text(encoding="utf-8"))
            return progress
        return {}

    def _write_progress(self, progress: dict[str, Any]) -> None:
        temporary = self.folder / f".{PROGRESS}"
        temporary.write_text(json.dumps(progress, indent=2), encoding="utf-8")
        temporary.replace(self.folder / PROGRESS)

    def _intact(self, entry: FileEntry) -> bool:
        path = self.folder / entry.file
        return path.is_file() and path.stat().st_size == entry.bytes and sha256(path) == entry.sha256


@contextlib.contextmanager
def disk_full_explained(place: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" into an MllmEdgeError that says what to do."""
    try:
        yield
    except OSError as error:
        # numpy's tofile reports how much it wrote, without an errno
        if error.errno not in FULL and (error.errno is not None or shutil.disk_usage(place).free > 1 << 20):
            raise
        raise MllmEdgeError(
            f"the disk of {place} is full; make room and run the same command again, it resumes where it stopped"
        ) from error


def _beside(final: Path, suffix: str) -> Path:
    return final.with_name(f"{final.name}.{suffix}")
