"""The tiny bundle of the runtime's tests, for tests outside their folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def write_bundle(folder: Path) -> Path:
    """A complete bundle with random weights: 16 px pictures, 4 positions each, a context of 128."""
    maker = Path(__file__).parents[1] / "runtime" / "conftest.py"
    spec = importlib.util.spec_from_file_location("runtime_bundle", maker)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_bundle(folder)
    return folder
