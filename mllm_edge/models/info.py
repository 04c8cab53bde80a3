"""What can be said of a system without importing PyTorch, and what its modules offer to those who have it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from mllm_edge.errors import MissingPackage

if TYPE_CHECKING:
    from torch import nn

    from mllm_edge.bundle.manifest import Prompt
    from mllm_edge.models.plan import Checkpoint, ExportPlan


class SystemModule(Protocol):
    """What `models/<system>/plan.py` offers to training, export and verification.

    `CONFIGS` maps a config's name to its dims; weights of those in `SHIPPED` come with the package, the default first.
    `PROMPTS` are what a user may choose from (`--template`).
    """

    CONFIGS: Mapping[str, Any]
    SHIPPED: Sequence[str]
    PROMPTS: Mapping[str, Prompt]
    tensor_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    load: Callable[[Path], Checkpoint]
    build: Callable[[Checkpoint], nn.Module]
    plan: Callable[[Checkpoint], ExportPlan]


@dataclass(frozen=True)
class SystemInfo:
    """A line of `mllm-edge systems`."""

    name: str
    title: str
    summary: str
    tasks: list[str]
    stages: list[str]
    configs: dict[str, str]
    base_checkpoints: list[str]
    licences: dict[str, str]

    def load_module(self) -> SystemModule:
        """Import the system's plan. Raises MissingPackage when PyTorch or transformers is not installed."""
        try:
            return cast("SystemModule", importlib.import_module(f"mllm_edge.models.{self.name}.plan"))
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("mllm_edge"):
                raise
            raise MissingPackage(error.name or "torch", "export") from None
