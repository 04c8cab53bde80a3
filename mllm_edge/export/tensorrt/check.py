"""A fresh engine against its own graph, which ONNX Runtime runs on the CPU: what the device's kernels cost."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import BuiltEngine, Manifest, Parity, StageEntry, TensorSpec
from mllm_edge.bundle.sources import Boxes, Constant, Labels, Task, Text
from mllm_edge.errors import OutOfTolerance
from mllm_edge.export.verify.difference import compare
from mllm_edge.machine.threads import usable_cores
from mllm_edge.runtime.engines.interface import Array, Options, Stage
from mllm_edge.runtime.engines.table import STAGE_ENGINES
from mllm_edge.runtime.engines.tensorrt.stage import Device, shape

# The graph is the same, so only the order of sums and what the kernels round may differ. `relative_max` is the largest
# difference over the largest value.
LIMITS = {
    "fp32": {"cosine": 0.9999, "relative_max": 0.01},  # GPUs multiply fp32 in TF32 where they may
    "fp16": {"cosine": 0.999, "relative_max": 0.05},
    "int8": {"cosine": 0.99, "relative_max": 0.2},
    "int4": {"cosine": 0.99, "relative_max": 0.2},
}
LENGTH = 2  # of axes that vary


class EngineCheck:
    """Compares a bundle's stages one by one, in their order: each reads what the graphs before it gave, if they ran."""

    def __init__(self, folder: Path, manifest: Manifest, device: Device):
        self._folder, self._device = folder, device
        self._options = Options("cpu", True, usable_cores(), "f16", manifest.language_model.context)
        self._random = np.random.default_rng(0)
        self._sources = {source.name: source for source in manifest.sources if not isinstance(source, Labels)}
        axes = manifest.build.axes
        self._fixed = {axis: least for axis, (least, _, most) in axes.items() if least == most}
        self._values: dict[str, Array] = {}

    def __call__(self, stage: StageEntry, built: BuiltEngine) -> Parity:
        """The row of an engine of a stage.

        Raises:
            OutOfTolerance: it is too far from its graph.
        """
        feed = {spec.name: self._value(spec) for spec in stage.inputs}
        graph: Stage = STAGE_ENGINES[stage.engine](self._folder / stage.file, stage, self._options)
        with contextlib.closing(graph):
            expected = graph(**feed)
        with contextlib.closing(self._device.open(self._folder, stage, built)) as engine:
            found = {name: np.asarray(array) for name, array in engine(**feed).items()}
        self._values |= expected
        rows = [compare(found[name], expected[name]) for name in expected]
        cosine, off = min(row["cosine"] for row in rows), max(row["relative_max"] for row in rows)
        limits = LIMITS[stage.precision]
        if not (cosine >= limits["cosine"] and off <= limits["relative_max"]):
            raise OutOfTolerance(
                f"the engine of {stage.name} differs from its graph (cosine {cosine:.4g}, at least "
                f"{limits['cosine']:g}; relative_max {off:.4g}, at most {limits['relative_max']:g}); export it with "
                "--precision fp32, or report this"
            )
        measured = {"cosine": cosine, "relative_max": off}
        return Parity(f"{stage.name} on {self._device.capability}", True, measured, limits)

    def _value(self, spec: TensorSpec) -> Array:
        """What an earlier stage gave, or what a source may look like: any question, boxes, pictures and states."""
        if spec.name in self._values:
            return self._values[spec.name]
        size = shape(spec, defaultdict(lambda: LENGTH, self._fixed))
        source = self._sources.get(spec.name)
        if isinstance(source, Boxes):
            corners = np.sort(self._random.uniform(0, 1, (*size[:-1], 2, 2)), axis=-2)
            value = corners.reshape(size)
        elif isinstance(source, Task):
            value = np.full(size, next(iter(source.values.values())))
        elif isinstance(source, Text) or spec.dtype == "int64":  # words, or how much of a cache counts
            value = np.ones(size)
        elif isinstance(source, Constant):
            value = np.load(locate(self._folder, source.file.file), allow_pickle=False)
        else:
            value = self._random.standard_normal(size)
        return np.asarray(value, spec.dtype)


def with_rows(old: Sequence[Parity], new: Sequence[Parity]) -> list[Parity]:
    """Rows in which newer ones of a name replace older ones."""
    names = {row.name for row in new}
    return [*(row for row in old if row.name not in names), *new]
