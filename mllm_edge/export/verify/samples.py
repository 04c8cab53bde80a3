"""Real inputs for the stages: pictures of scenes, preprocessed as the runtime does it, through the stages before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn

from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput
from mllm_edge.models.plan import ExportPlan, StageExport
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.turn import Need
from mllm_edge.runtime.wiring import makers
from mllm_edge.scenes import render, sample_scene

Feed = dict[str, np.ndarray]

PICTURE_SIZE = 256  # pixels; each encoder's own preprocessing resizes it


def pictures(count: int, first: int = 0) -> list[np.ndarray]:
    """`count` pictures of the validation scenes from number `first` on: uint8 [256,256,3]."""
    return [render(sample_scene("validation", first + index), PICTURE_SIZE) for index in range(count)]


class Samples:
    """What each stage of a plan reads and returns in PyTorch when the system sees the given pictures.

    Nothing is computed before it is asked for, and a stage's module is released as soon as it has run.
    """

    def __init__(self, plan: ExportPlan, pictures: Sequence[np.ndarray], given: Mapping[str, np.ndarray] | None = None):
        """`given` are tensors in place of the plan's examples."""
        self._plan = plan
        constants = {name: make() for name, make in plan.constants.items()}
        known = {**plan.examples, **constants, **(given or {})}
        self._values = [{**known, **_pixels(plan, picture)} for picture in pictures]
        self._done: set[str] = set()

    def need(self, number: int, values: Mapping[str, np.ndarray]) -> Need:
        """A tensor as PyTorch makes it for picture `number`, where `values` stand for what they name."""
        known, modules = self._values[number], dict[str, nn.Module]()
        made_by = makers(self._plan.stages)

        def need(name: str) -> np.ndarray:
            if name in values:
                return values[name]
            stage = cast("StageExport | None", made_by.get(name))
            if stage is None or (name in known and not needs_values(stage)):
                return known[name]
            if stage.name not in modules:
                modules[stage.name] = stage.compared()
            with torch.no_grad():
                result = modules[stage.name](*(torch.from_numpy(np.array(need(spec.name))) for spec in stage.inputs))
            outputs = (result,) if isinstance(result, torch.Tensor) else result
            return {spec.name: tensor.numpy() for spec, tensor in zip(stage.outputs, outputs, strict=True)}[name]

        def needs_values(stage: StageExport) -> bool:
            """Whether anything that leads to a stage has another value here."""
            names = [spec.name for spec in stage.inputs]
            return any(name in values or (name in made_by and needs_values(made_by[name])) for name in names)  # type: ignore[arg-type]

        return need

    def inputs(self, stage: StageExport) -> list[Feed]:
        """The stage's inputs by name, one entry per picture. Raises BadInput when no stage before it makes one."""
        for earlier in self._plan.stages[: self._plan.stages.index(stage)]:
            if not self._ready(stage):
                self._run(earlier)
        if not self._ready(stage):
            raise BadInput(
                f"{stage.name} reads {_names(stage)}, which neither pictures nor earlier stages give; correct the plan"
            )
        return [{spec.name: values[spec.name] for spec in stage.inputs} for values in self._values]

    def outputs(self, stage: StageExport) -> list[Feed]:
        """The stage's outputs by name in fp32 PyTorch, one entry per picture."""
        self.inputs(stage)
        self._run(stage)
        return [{spec.name: values[spec.name] for spec in stage.outputs} for values in self._values]

    def _ready(self, stage: StageExport) -> bool:
        return all(spec.name in values for values in self._values for spec in stage.inputs)

    def _run(self, stage: StageExport) -> None:
        if stage.name in self._done:
            return
        module = stage.compared()
        for values in self._values:
            with torch.no_grad():
                result = module(*(torch.from_numpy(values[spec.name]) for spec in stage.inputs))
            tensors = (result,) if isinstance(result, torch.Tensor) else result
            values.update({spec.name: tensor.numpy() for spec, tensor in zip(stage.outputs, tensors, strict=True)})
        self._done.add(stage.name)


def _pixels(plan: ExportPlan, picture: np.ndarray) -> Feed:
    image = Image.fromarray(picture)
    return {source.name: preprocess(image, source) for source in plan.sources if isinstance(source, Pixels)}


def _names(stage: StageExport) -> str:
    return ", ".join(spec.name for spec in stage.inputs)
