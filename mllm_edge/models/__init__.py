"""The systems. A new one is a folder here and a word in `SYSTEMS`; nothing else in the package knows its name."""

from __future__ import annotations

import difflib
import importlib

from mllm_edge.errors import BadInput
from mllm_edge.models.info import SystemInfo

SYSTEMS = ("llava", "glamm")


def get(name: str) -> SystemInfo:
    """The system called `name`. Raises BadInput that names the nearest known one."""
    if name in SYSTEMS:
        info: SystemInfo = importlib.import_module(f"mllm_edge.models.{name}").INFO
        return info
    near = difflib.get_close_matches(name, SYSTEMS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see: mllm-edge systems"
    raise BadInput(f"there is no system {name!r}; {hint}")
