"""Is a GGUF file one that llama.cpp survives?

What can be read is checked by reading (`gguf_file`). The rest is tried in a child process, once for each head of a file
and build of llama.cpp: the head is all that llama.cpp interprets, the weights are only numbers. A head that lived is
known again by its hash: to read a large vocabulary takes a third of a second.
"""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.llama import probe
from mllm_edge.runtime.engines.llama.gguf_file import name_of, read_head
from mllm_edge.version import __version__

LEAST_S, BYTES_PER_S = 20, 20_000_000  # a slow card's reading


def require_sound(path: Path) -> None:
    """Raises BadInput where llama.cpp would end the process, or does not come to an end."""
    state = path.stat()
    _require(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # tokenizer and weights are often one file
def _require(path: Path, inode: int, size: int, changed: int) -> None:
    prefix = f"{probe.build_key()}/{__version__}/head/{size}/"  # the version: what is read may be checked more strictly
    if _lived(path, size, probe.known_under(prefix)):
        return
    head = read_head(path)
    key = f"{prefix}{head.length}/{head.sha256}"
    crashed = probe.known(key)
    if crashed is None:
        crashed = _try(path, LEAST_S + size / BYTES_PER_S)
        if crashed is not None:
            probe.remember(key, crashed)
    if crashed:
        raise BadInput(f"{path} makes llama.cpp crash; do not use it, or export the bundle again")


def _lived(path: Path, size: int, verdicts: Mapping[str, bool]) -> bool:
    """Whether the file's head is one that was read, tried and did not crash."""
    names: dict[int, set[str]] = {}
    for key, crashed in verdicts.items():
        length, _, name = key.partition("/")
        if not crashed and length.isdigit() and int(length) <= size:
            names.setdefault(int(length), set()).add(name)
    with path.open("rb") as file:
        head = file.read(max(names, default=0))
    return any(name_of(head[:length], size) in known for length, known in names.items())


def _try(path: Path, timeout: float) -> bool | None:
    """Whether it crashes; None where llama.cpp refuses it, which it will do again, or there was no memory."""
    try:
        code = probe.try_in_child(probe.plain_command(path), timeout)
    except subprocess.TimeoutExpired:
        raise BadInput(f"{path} was not loaded within {timeout:.0f} s; do not use it, or free the machine") from None
    if code == 0:
        return False
    return True if code is not None and -code in probe.CRASHES else None
