"""A bundle's stages against their PyTorch modules, one at a time."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import Parity, StageEntry
from mllm_edge.export.verify.difference import compare, parity, worst
from mllm_edge.export.verify.samples import Samples
from mllm_edge.models.plan import StageExport
from mllm_edge.quants import PRECISIONS
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.table import STAGE_ENGINES


def stage_row(folder: Path, entry: StageEntry, stage: StageExport, samples: Samples, options: Options) -> Parity:
    """One stage at a time is in memory, and PyTorch's first."""
    expected = samples.outputs(stage)
    with contextlib.closing(STAGE_ENGINES[entry.engine](locate(folder, entry.file), entry, options)) as engine:
        pairs = [
            (np.asarray(engine(**feed)[name]), outputs[name])
            for feed, outputs in zip(samples.inputs(stage), expected, strict=True)
            for name in outputs
        ]
    return parity(stage.name, worst([compare(*pair) for pair in pairs]), PRECISIONS[entry.precision].tolerance)
