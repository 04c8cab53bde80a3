"""What a system hands to training and export: dims, a checkpoint, and the plan of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.bundle.manifest import Generation, ImagePreprocessing, Prompt, TensorSpec
from mllm_edge.models.language.llama import LlamaDims

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a system under our canonical names, read lazily.

    `tensors[name]` loads one tensor; nothing else is held in memory. `tokenizer` is a folder with `tokenizer.model`
    (SentencePiece) or `tokenizer.json`. `source` says where the weights came from (kind, path, sha256).
    """

    system: str
    config: str
    dims: Any
    tensors: Mapping[str, torch.Tensor]
    tokenizer: Path
    source: dict[str, str]


@dataclass(frozen=True)
class StageExport:
    """A stage to lower to ONNX. `module()` builds it with its weights (fp32, eval); its forward takes the inputs in
    order and returns the outputs in order. `precisions` are the ones it may be lowered to; when the one asked for is
    not among them the last one is used. Modules whose names begin with one of `float32` stay in fp32 where others are
    fp16."""

    name: str
    module: Callable[[], torch.nn.Module]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    float32: tuple[str, ...] = ()


@dataclass(frozen=True)
class LanguageModelExport:
    """A decoder to write as GGUF. `tensors` has the Hugging Face names of `LlamaForCausalLM`."""

    architecture: str
    dims: LlamaDims
    tensors: Mapping[str, torch.Tensor]
    tokenizer: Path
    state_positions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportPlan:
    """Everything that export needs to know about one checkpoint of one system.

    `examples` are inputs of stages, by tensor name, that no picture and no earlier stage gives; `question` is one whose
    answer has all that the system can answer with. `extras` write files that belong to no stage, by
    the option that asks for them.
    """

    tasks: list[str]
    stages: list[StageExport]
    language_model: LanguageModelExport
    preprocessing: list[ImagePreprocessing]
    prompt: Prompt
    generation: Generation
    licences: dict[str, str]
    examples: dict[str, np.ndarray] = field(default_factory=dict)
    question: str = "What is in the picture?"
    extras: dict[str, Callable[[Path], None]] = field(default_factory=dict)
