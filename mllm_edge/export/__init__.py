"""Export: from a checkpoint to a bundle.

`mllm_edge.export` is both this package and the function of the Python API: importing a submodule puts the package
under that name, so the package itself can be called.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any


class _Export(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Path:
        """See `mllm_edge.export.export.export`."""
        from mllm_edge.export.export import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _Export
