"""What follows from a manifest's tensor names alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mllm_edge.bundle.manifest import TensorSpec

EMBEDS = "image_embeds"  # the tensor that is spliced into the language model's input
BOXES, REGION_EMBEDS = "boxes", "region_embeds"


class Wired(Protocol):
    """What has named inputs and outputs: a bundle's stage, or one that is to be exported."""

    @property
    def name(self) -> str: ...
    @property
    def inputs(self) -> list[TensorSpec]: ...
    @property
    def outputs(self) -> list[TensorSpec]: ...


def needed_for(tensor: str, stages: Sequence[Wired]) -> set[str]:
    """Names of the stages that a tensor is made by."""
    makers = {spec.name: stage for stage in stages for spec in stage.outputs}
    if tensor not in makers:
        return set()
    maker = makers[tensor]
    return {maker.name}.union(*(needed_for(spec.name, stages) for spec in maker.inputs))
