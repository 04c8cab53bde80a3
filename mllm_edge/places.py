"""Places where results go: which folders are ours, told by a mark in them, and one line about places that cannot be."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from mllm_edge.errors import BadInput, MllmEdgeError

MARK = ".mllm-edge"  # a file in each folder that we may empty; its first line says what the folder is
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_ours(folder: Path, kind: str) -> bool:
    """Whether the folder carries our mark of that kind. A link to one does not."""
    mark = folder / MARK
    if folder.is_symlink() or mark.is_symlink() or not mark.is_file():
        return False
    with mark.open(encoding="utf-8", errors="replace") as stream:
        return stream.readline(len(kind) + 1).rstrip("\n") == kind


def claim(folder: Path, kind: str) -> None:
    """Make a folder ours, which is then written to and emptied freely: a new one, an empty one, or one with our mark.

    Raises:
        BadInput: it is a link, or somebody else's.
    """
    no_link(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        taken = any(file.name != MARK for file in folder.iterdir())  # the mark itself may be half written
        if is_ours(folder, kind):
            return
        if taken or (folder / MARK).is_symlink():
            raise BadInput(f"{folder} holds files, but no {kind} of ours; move it away or choose another name")
        mark(folder, kind)


def mark(folder: Path, kind: str) -> None:
    """Put our mark into a folder."""
    (folder / MARK).write_text(f"{kind}\n", encoding="utf-8")


def no_link(place: Path) -> None:
    """Raise BadInput where the place is a link: what it leads to may be anybody's."""
    if "\0" in str(place):
        raise BadInput(f"{str(place)!r} has a NUL character; no path has one")
    with writing(place):  # a name may be too long even to ask
        if place.is_symlink():
            raise BadInput(f"{place} is a link, which is not followed; give the place itself")


def can_be_made(folder: Path) -> None:
    """Raise BadInput where the folder neither is there to be written to nor can be made. Makes nothing."""
    no_link(folder)
    with writing(folder):
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise BadInput(f"{folder} cannot be a folder ({there} is a file); choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise BadInput(f"{folder} cannot be written ({there} is read-only here); choose another place")


def file_can_be_made(file: Path) -> None:
    """Raise BadInput where the file cannot be written: its folder is missing or closed, or it is something else."""
    if not file.parent.is_dir():
        raise BadInput(f"{file.parent} is no folder; make it, or write elsewhere")
    if file.exists() and not file.is_file() and not file.is_char_device():
        raise BadInput(f"{file} is no plain file; write elsewhere")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise BadInput(f"{file} cannot be written (it is read-only here); write elsewhere")


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """While something is written there: what the system says against the place becomes one line."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise MllmEdgeError(f"the disk of {place} is full; make room or choose another place") from error
        raise BadInput(f"{place} cannot be written ({error.strerror or error}); choose another place") from error
