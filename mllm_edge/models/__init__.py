"""The systems. A new one is a folder here and a word in `SYSTEMS`; nothing else in the package knows its name."""

from __future__ import annotations

import importlib

from mllm_edge.errors import no_such
from mllm_edge.models.info import SystemInfo

SYSTEMS = ("llava", "lion", "gill", "glamm")


def get(name: str) -> SystemInfo:
    """The system called `name`. Raises BadInput that names the nearest known one."""
    if name in SYSTEMS:
        info: SystemInfo = importlib.import_module(f"mllm_edge.models.{name}").INFO
        return info
    raise no_such("system", name, SYSTEMS, "see: mllm-edge systems")
