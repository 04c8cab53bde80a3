"""mllm-edge: multimodal LLMs from a recipe or a public checkpoint to the machine they must run on.

    model = mllm_edge.load("llava.bundle")
    answer = model.generate("What is this?", image="scene.png")

Importing the package loads neither an engine nor PyTorch: `load` and `export` are found when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mllm_edge.version import __version__

if TYPE_CHECKING:
    from mllm_edge import export as export
    from mllm_edge.runtime import load as load

__all__ = ["__version__", "export", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("mllm_edge.runtime").load
    if name == "export":
        return importlib.import_module("mllm_edge.export")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
