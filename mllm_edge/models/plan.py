"""What a system hands to training and export: dims, a checkpoint, and the plan of its stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.bundle.answers import AnswerEntry
from mllm_edge.bundle.manifest import Generation, Prompt, TensorSpec, Tokenizer
from mllm_edge.bundle.sources import Source

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mllm_edge.models.language.reference import DecoderDims, Reference


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a system under our canonical names, read lazily.

    `tensors[name]` loads one tensor; nothing else is held in memory. `tokenizer` is a folder with `tokenizer.model`
    (SentencePiece) or `tokenizer.json`. `source` says where the weights came from (kind, path, sha256). `prompt()` is
    what its dialogues look like, and how that is known; without it the system's own is taken. It raises BadInput where
    that cannot be known. `references` build, by stage or "language_model", another implementation's module with
    the same weights: the library's whose layout this is.
    """

    system: str
    config: str
    dims: Any
    tensors: Mapping[str, torch.Tensor]
    tokenizer: Path
    source: dict[str, str]
    prompt: Callable[[], tuple[Prompt, str]] | None = None
    references: Mapping[str, Callable[[], torch.nn.Module]] = field(default_factory=dict)


@dataclass(frozen=True)
class StageExport:
    """A stage to lower to ONNX. `module()` builds it with its weights (fp32, eval); its forward takes the inputs in
    order and returns the outputs in order. `precisions` are the ones it may be lowered to; when the one asked for is
    not among them the last one is used. Modules whose names begin with one of `float32` stay in fp32 where others are
    fp16. `reference()` builds another implementation's module, which the stage is compared with where there is one."""

    name: str
    module: Callable[[], torch.nn.Module]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8")
    float32: tuple[str, ...] = ()
    reference: Callable[[], torch.nn.Module] | None = None

    def compared(self) -> torch.nn.Module:
        """The module that the stage is compared with."""
        return (self.reference or self.module)().eval()


@dataclass(frozen=True)
class LanguageModelExport:
    """The language model.

    `kind` "causal" is written as a GGUF file from `tensors`, which have the names of transformers' class of that
    `architecture`; or, as "seq2seq" is, as the ONNX `parts` of `runtime/engines/parts_language_model.py`. Answers of
    "seq2seq" start with token `start`. `tokenizer` is the checkpoint's folder, `tokenizer_name` its name among the
    plan's tokenizers.
    `reference()` builds the PyTorch reference of it alone, in fp32.
    """

    dims: DecoderDims
    tokenizer: Path
    reference: Callable[[], Reference]
    kind: str = "causal"
    architecture: str = "llama"
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    parts: list[StageExport] = field(default_factory=list)
    start: int | None = None
    tokenizer_name: str = "language_model"


@dataclass(frozen=True)
class ExportPlan:
    """Everything that export needs to know about one checkpoint of one system.

    Attributes:
        tasks: what it can be asked for, for people.
        sources: where inputs of stages come from, but for the constants.
        stages: in the order in which they can run.
        tokenizers: the language model's among them; `file` is "language_model.gguf" or one of `files`.
        answers: kinds of answers beside text.
        constants: make the arrays that stages read, or that stand in the prompt.
        files: files that are copied into the bundle, by their names there.
        examples: inputs of stages that neither pictures nor stages nor constants give: what the sources may give.
        question: one whose answer has all that the system can answer with.
        extras: write files that belong to no stage, by the option that asks for them.
        prompt_from: how it is known that the prompt is the checkpoint's, for people.
    """

    tasks: list[str]
    sources: list[Source]
    stages: list[StageExport]
    tokenizers: list[Tokenizer]
    language_model: LanguageModelExport
    prompt: Prompt
    generation: Generation
    licences: dict[str, str]
    answers: list[AnswerEntry] = field(default_factory=list)
    constants: dict[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    examples: dict[str, np.ndarray] = field(default_factory=dict)
    question: str = "What is in the picture?"
    extras: dict[str, Callable[[Path], None]] = field(default_factory=dict)
    prompt_from: str = ""

    @property
    def pictured(self) -> list[StageExport]:
        """The stages whose outputs stand in the prompt in place of a picture."""
        names = {name for slot in self.prompt.slots_of("pixels") for name in slot.tensors}
        return [stage for stage in self.stages if names & {spec.name for spec in stage.outputs}]

    @property
    def picture_tokens(self) -> int:
        """Positions that a picture takes in the prompt."""
        names = {name for slot in self.prompt.slots_of("pixels") for name in slot.tensors}
        specs = [spec for stage in self.stages for spec in stage.outputs if spec.name in names]
        return sum(int(spec.shape[-2]) for spec in specs)
