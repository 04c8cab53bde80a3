"""The folder in which a bundle grows until everything is verified.

Each finished step is recorded in `progress.json` with a key of all its inputs, so that a second run after a crash, a
full disk or Ctrl-C redoes only steps that are missing or whose inputs changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mllm_edge.bundle.manifest import MANIFEST
from mllm_edge.bundle.read import file_entry, sha256
from mllm_edge.bundle.sources import FileEntry
from mllm_edge.errors import MllmEdgeError
from mllm_edge.growing import Growing, Kind
from mllm_edge.places import FULL

PROGRESS = "progress.json"
BUNDLE = Kind("a bundle", MANIFEST, "unfinished export", "replaced bundle")


@dataclass(frozen=True)
class Finished:
    """A step's files, and other results to keep (JSON values)."""

    files: list[FileEntry]
    details: dict[str, Any] = field(default_factory=dict)


class Workplace(Growing):
    """One export's folder on disk, with its finished steps."""

    def __init__(self, final: Path, force: bool):
        super().__init__(final, force, BUNDLE)

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
