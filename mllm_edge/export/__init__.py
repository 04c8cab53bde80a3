"""Export: from a checkpoint to a bundle.

`mllm_edge.export` is both this package and the function of the Python API: importing a submodule puts the package
under that name, so the package itself can be called.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

# PyTorch and llama.cpp share one OpenMP library, which reads this when PyTorch loads it: later than here is too late
# for the verification, whose threads would spin on a busy machine (runtime/engines/llama/library.py).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class _Export(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Path:
        """See `mllm_edge.export.export.export`."""
        from mllm_edge.export.export import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _Export
