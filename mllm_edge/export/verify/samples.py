"""Real inputs for the stages: pictures of scenes, preprocessed as the runtime does it, through the stages before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from mllm_edge.bundle.manifest import ImagePreprocessing
from mllm_edge.errors import BadInput
from mllm_edge.models.plan import ExportPlan, StageExport
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import render, sample_scene

Feed = dict[str, np.ndarray]

PICTURE_SIZE = 256  # pixels; each encoder's own preprocessing resizes it


def pictures(count: int, first: int = 0) -> list[np.ndarray]:
    """`count` pictures of the validation scenes from number `first` on: uint8 [256,256,3]."""
    return [render(sample_scene("validation", first + index), PICTURE_SIZE) for index in range(count)]


class Samples:
    """What each stage of a plan reads and gives in PyTorch when the system sees the given pictures.

    Nothing is computed before it is asked for, and a stage's module is released as soon as it has run.
    """

    def __init__(self, plan: ExportPlan, pictures: Sequence[np.ndarray]):
        self._plan = plan
        self._values = [{**plan.examples, **_pixels(plan.preprocessing, picture)} for picture in pictures]
        self._done: set[str] = set()

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
        module = stage.module().eval()
        for values in self._values:
            with torch.no_grad():
                result = module(*(torch.from_numpy(values[spec.name]) for spec in stage.inputs))
            tensors = (result,) if isinstance(result, torch.Tensor) else result
            values.update({spec.name: tensor.numpy() for spec, tensor in zip(stage.outputs, tensors, strict=True)})
        self._done.add(stage.name)


def _pixels(steps: Sequence[ImagePreprocessing], picture: np.ndarray) -> Feed:
    image = Image.fromarray(picture)
    return {step.input: preprocess(image, step) for step in steps}


def _names(stage: StageExport) -> str:
    return ", ".join(spec.name for spec in stage.inputs)
