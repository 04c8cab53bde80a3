"""The registry of systems. A new system is one file, one entry here, and a pipeline if its kind of answer is new."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from mllm_edge.errors import BadInput, MissingPackage

if TYPE_CHECKING:
    from torch import nn

    from mllm_edge.models.interface import Checkpoint, ExportPlan


class SystemModule(Protocol):
    """What the file of a system offers to export and verification."""

    resolve: Callable[[str, str | None], Checkpoint]
    export_plan: Callable[[Checkpoint], ExportPlan]
    build: Callable[[Checkpoint], nn.Module]
    write_mmproj: Callable[[Checkpoint, Path], None]


@dataclass(frozen=True)
class SystemInfo:
    """What can be said of a system without importing PyTorch."""

    name: str
    title: str
    summary: str
    tasks: list[str]
    stages: list[str]
    configs: dict[str, str]
    base_checkpoints: list[str]
    licences: dict[str, str]
    module: str

    def load_module(self) -> SystemModule:
        """Import the system's file. Raises MissingPackage when PyTorch or transformers is not installed."""
        try:
            return cast("SystemModule", importlib.import_module(self.module))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mllm_edge"):
                raise
            raise MissingPackage(error.name or "torch", "export") from None


SYSTEMS: dict[str, SystemInfo] = {
    "llava": SystemInfo(
        name="llava",
        title="LLaVA v1 / v1.5",
        summary="Chat about pictures: CLIP tapped at -2, a linear or two-layer connector, a LLaMA decoder.",
        tasks=["chat"],
        stages=["vision_encoder", "connector", "language_model"],
        configs={
            "tiny": "5 M parameters, 128 px; trained by our recipes, ships with the package",
            "smol": "MobileNetV2 at 288 px + SmolLM2-135M out of two packages; names things, what joins them ships",
            "1b": "CLIP-L/14-336 + a 1.1 B LLaMA (22 layers, width 2048, 32 heads / 4 KV)",
            "7b": "LLaVA-1.5-7B: CLIP-L/14-336 + Vicuna-7B",
            "13b": "LLaVA-1.5-13B: CLIP-L/14-336 + Vicuna-13B",
        },
        base_checkpoints=[
            "liuhaotian/llava-v1.5-7b",
            "liuhaotian/llava-v1.5-13b",
            "llava-hf/llava-1.5-7b-hf",
            "llava-hf/llava-1.5-13b-hf",
        ],
        licences={
            "code": "Apache-2.0",
            "tiny weights": "Apache-2.0",
            "published weights": "the base LLM's (Llama 2 Community for v1.5) and its training data's terms",
        },
        module="mllm_edge.models.llava",
    ),
    "glamm": SystemInfo(
        name="glamm",
        title="GLaMM",
        summary="Answers whose phrases carry pixel masks, questions about boxes: LLaVA, SAM, and a region encoder.",
        tasks=["chat", "grounded conversation", "referring segmentation", "region captioning"],
        stages=["vision_encoder", "connector", "region_encoder", "mask_encoder", "mask_decoder", "language_model"],
        configs={
            "tiny": "6 M parameters, 128 px; trained by our recipes, ships with the package",
            "7b-lite": "7b with SAM ViT-B: 0.5 B parameters less, for boards of 8 GB",
            "7b": "CLIP-L/14-336 + Vicuna-7B + SAM ViT-H at 1024 px + a region encoder of 0.3 B",
        },
        base_checkpoints=[
            "MBZUAI/GLaMM-FullScope",
            "MBZUAI/GLaMM-GCG",
            "MBZUAI/GLaMM-RefSeg",
            "MBZUAI/GLaMM-RegCap-RefCOCOg",
            "MBZUAI/GLaMM-RegCap-VG",
            "MBZUAI/GLaMM-GranD-Pretrained",
        ],
        licences={
            "code": "Apache-2.0",
            "tiny weights": "Apache-2.0",
            "published weights": "Llama 2 Community, SAM Apache-2.0, and the terms of GranD's pictures",
        },
        module="mllm_edge.models.glamm",
    ),
}


def get(name: str) -> SystemInfo:
    """The system called `name`. Raises BadInput that names the nearest known one."""
    if name in SYSTEMS:
        return SYSTEMS[name]
    near = difflib.get_close_matches(name, SYSTEMS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "see: mllm-edge systems"
    raise BadInput(f"there is no system {name!r}; {hint}")
