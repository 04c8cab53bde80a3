"""A folder that grows in `<name>.partial`, beside its final name, until it is complete.

The growing folder carries a mark of ours, without which it is not touched. The lock is the system's and ends with its
process, in whatever container that ran.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge.errors import BadInput
from mllm_edge.places import MARK, claim, is_ours, mark, no_link, writing

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Kind:
    """What grows.

    Attributes:
        name: for people, with its article.
        sign: the file without which a folder is none.
        unfinished: the mark of `.partial`.
        replaced: the mark of `.old`.
    """

    name: str
    sign: str
    unfinished: str
    replaced: str


class Growing:
    """One such folder. A context manager that holds the lock on the final name.

    Attributes:
        folder: where it grows.
        final: its name when it is complete.
    """

    def __init__(self, final: Path, force: bool, kind: Kind):
        """`force`: a complete one of that name may be replaced."""
        if final.name in ("", ".."):
            raise BadInput(f"-o {final} has no name of its own; give the folder one, as {final / 'new'}")
        self.final, self.folder = final, _beside(final, "partial")
        self._force, self._kind = force, kind
        self._old, self._lock = _beside(final, "old"), _beside(final, "lock")

    def __enter__(self) -> Self:
        """Take the lock and make the folder.

        Raises:
            BadInput: another process is writing there, the final name is taken, or a place is not ours or cannot be.
        """
        with writing(self.final.parent):
            self.final.parent.mkdir(parents=True, exist_ok=True)
        self._locked = self._take_lock()
        try:
            no_link(self.final)
            if is_ours(self._old, self._kind.replaced) and not self.final.exists():
                self._put_back()  # a process died between the two renames of `publish`
            self._check_final()
            claim(self.folder, self._kind.unfinished)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.unlink(missing_ok=True)
        os.close(self._locked)

    def publish(self, files: Iterable[str]) -> Path:
        """Give the folder its final name; what is not among `files`, names relative to it, is deleted."""
        keep = {self._kind.sign, MARK, *files}
        for path in sorted(self.folder.rglob("*"), reverse=True):
            is_folder = path.is_dir() and not path.is_symlink()
            if is_folder and not any(path.iterdir()):
                path.rmdir()
            elif not is_folder and path.relative_to(self.folder).as_posix() not in keep:
                path.unlink()
        self._forget_old()
        try:
            if self.final.exists():
                mark(self.final, self._kind.replaced)
                self.final.rename(self._old)
            self.folder.rename(self.final)
        finally:
            if is_ours(self._old, self._kind.replaced) and not self.final.exists():
                self._put_back()
        (self.final / MARK).unlink()
        self._forget_old()
        return self.final

    def _put_back(self) -> None:
        self._old.rename(self.final)
        (self.final / MARK).unlink()

    def _forget_old(self) -> None:
        if is_ours(self._old, self._kind.replaced):
            shutil.rmtree(self._old)

    def _check_final(self) -> None:
        if not self.final.exists() or (self.final.is_dir() and not any(self.final.iterdir())):
            return
        if not (self.final / self._kind.sign).is_file():
            raise BadInput(f"{self.final} exists and is not {self._kind.name}; choose another name with -o")
        if not self._force:
            raise BadInput(f"{self.final} exists; use --force to replace it or choose another name with -o")
        if self._old.exists() and not is_ours(self._old, self._kind.replaced):
            raise BadInput(f"{self._old} is not ours, and what is replaced would be moved there; move it away first")

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
                raise BadInput(f"another process is writing {self.final}; wait for it")
            return lock
        except BaseException:
            os.close(lock)
            raise


def _beside(final: Path, suffix: str) -> Path:
    return final.with_name(f"{final.name}.{suffix}")
