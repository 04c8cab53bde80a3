"""Is a GGUF file one that llama.cpp survives?

What can be read is checked by reading (`gguf_file`). The rest is tried in a child process, once for each head of a file
and build of llama.cpp: the head is all that llama.cpp interprets, the weights are only numbers.
"""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.llama import probe
from mllm_edge.runtime.engines.llama.gguf_file import read_head

LEAST_S, BYTES_PER_S = 20, 20_000_000  # a slow card's reading


def require_sound(path: Path) -> None:
    """Raises BadInput where llama.cpp would end the process, or does not come to an end."""
    state = path.stat()
    _require(path, state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)  # tokenizer and weights are often one file
def _require(path: Path, inode: int, size: int, changed: int) -> None:
    head = read_head(path)
    key = f"{probe.build_key()}/head/{head.sha256}"
    crashed = probe.known(key)
    if crashed is None:
        crashed = _try(path, LEAST_S + size / BYTES_PER_S)
        if crashed is not None:
            probe.remember(key, crashed)
    if crashed:
        raise BadInput(f"{path} makes llama.cpp crash; do not use it, or export the bundle again")


def _try(path: Path, timeout: float) -> bool | None:
    """Whether it crashes; None where llama.cpp refuses it, which it will do again, or there was no memory."""
    try:
        code = probe.try_in_child(probe.plain_command(path), timeout)
    except subprocess.TimeoutExpired:
        raise BadInput(f"{path} was not loaded within {timeout:.0f} s; do not use it, or free the machine") from None
    if code == 0:
        return False
    return True if code is not None and -code in probe.CRASHES else None
