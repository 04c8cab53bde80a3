"""The manifest (`bundle.json`): the only contract between export and runtime.

A bundle is a folder with `bundle.json` and the files of its parts. Everything that the runtime knows of a model stands
in here as data: wiring, sources, prompt template, kinds of answers, tokenizers, hashes, measured parity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from mllm_edge.bundle.answers import AnswerEntry
from mllm_edge.bundle.sources import Constant, FileEntry, Source
from mllm_edge.errors import BadInput

SCHEMA = 2
MANIFEST = "bundle.json"


@dataclass(frozen=True)
class TensorSpec:
    """A named, typed input or output. `shape` is static; a string names an axis that may vary."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class BuiltEngine(FileEntry):
    """A TensorRT engine of a stage: the package that built it, its version, the GPUs that it is for ("sm_89"), the
    graph that it was built from (`read.graph_of`), and the lengths of its named axes (`BuildSettings.axes`)."""

    package: str
    version: str
    capabilities: list[str]
    graph: str
    axes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class BuildSettings:
    """How a device builds engines of the stages: the boards that the bundle was made for; the least, usual and greatest
    length of each named axis; the most scratch memory of a kernel in MB (10^6 bytes; 0 leaves it to TensorRT); and the
    file beside the manifest that keeps measured kernel times."""

    devices: list[str] = field(default_factory=list)
    axes: dict[str, list[int]] = field(default_factory=dict)
    workspace_mb: int = 0
    timing_cache: str = "timing.cache"


@dataclass(frozen=True)
class StageEntry(FileEntry):
    """One sub-network and the engine that runs it. Stages are wired to each other and to the sources by tensor names.

    A stage of engine "tensorrt" has its graph as `file`, and `engines` that were built from it; without any, the device
    has to build its own.

    `flops` counts the floating-point operations of its products, `activation_bytes` the most that its graph holds
    between nodes; 0 if unknown.
    """

    name: str
    engine: str
    precision: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    data_files: list[FileEntry] = field(default_factory=list)
    flops: int = 0
    activation_bytes: int = 0
    engines: list[BuiltEngine] = field(default_factory=list)


# The prompt.


@dataclass(frozen=True)
class Slot:
    """A placeholder of the prompt that rows of tensors replace, those of `tensors` one after the other, between the
    texts `open` and `close`.

    `of` is "pixels" (a picture each; in front of a question without the placeholder stands `joint`), "boxes" (a row for
    each of the user's boxes) or "constant".
    """

    placeholder: str
    of: str
    tensors: list[str]
    open: str = ""
    close: str = ""
    joint: str = ""


@dataclass(frozen=True)
class Prompt:
    """A chat template as data. `first` and `next` open a user turn with {system}, {text} and the fields of `Labels`;
    `answer` closes the assistant's turn with {text}. Text between placeholders is tokenized piece by piece.

    BOS opens a dialogue; where it stands `bos_with_text`, it does so behind the pictures that come first. With
    `late_stop` the strings of `stop` end no answer that they open.

    `questions` are those that a user need not word: "describe", "segment" and "locate" (of {what}) and "region" (of one
    box).
    """

    name: str
    system: str
    first: str
    next: str
    answer: str
    stop: list[str]
    slots: list[Slot] = field(default_factory=list)
    questions: dict[str, str] = field(default_factory=dict)
    bos_with_text: bool = False
    late_stop: bool = False

    def slots_of(self, of: str) -> list[Slot]:
        """The slots for "pixels", "boxes" or constants."""
        return [slot for slot in self.slots if slot.of == of]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: `kind` "gguf" (inside the GGUF `file`) or "json" (a `tokenizer.json`).

    `lead` is put before the first piece of a prompt (a tokenizer that adds its own leading space needs none). White
    space beside a token of `added` is dropped, as the slow tokenizers of transformers 4 did. `bos` opens a sequence and
    `ends` end an answer; a GGUF knows both itself.
    """

    name: str
    kind: str
    file: str
    lead: str = ""
    added: list[str] = field(default_factory=list)
    bos: str = ""
    ends: list[str] = field(default_factory=list)


# The language model.


@dataclass(frozen=True)
class EmbeddingTable:
    """Where the token embedding lies inside the language model's file, so that the runtime reads single rows of it.

    `dtype` is one of F32, F16, Q8_0; `offset` is in bytes from the start of the file; `shape` is [vocabulary, width].
    """

    dtype: str
    offset: int
    shape: list[int]


@dataclass(frozen=True)
class GgufDetails(FileEntry):
    """The language model's GGUF file; `kv_width` counts the channels of one layer's keys, and as many of its values."""

    layers: int
    kv_width: int
    embedding: EmbeddingTable


@dataclass(frozen=True)
class LanguageModelEntry:
    """The part that steps: `kind` "causal" or "seq2seq".

    Its weights are a GGUF file, or ONNX `parts`, as `runtime/engines/parts_language_model.py` describes them;
    `start` is the token that a seq2seq answer starts with. `context` counts positions: of prompt and answer together
    ("causal"), or of each ("seq2seq"). `kv_bytes_per_token` are the bytes of one position's keys and values at 16 bits
    a number. `flops_per_token` counts the operations of the products with weights, `bytes_per_token` the weights that
    one step reads; 0 if unknown. `encoder_flops_per_token` are a prompt token's where an encoder reads it.
    """

    name: str
    engine: str
    kind: str
    precision: str
    tokenizer: str
    context: int
    width: int
    vocabulary: int
    kv_bytes_per_token: int
    gguf: GgufDetails | None = None
    parts: list[StageEntry] = field(default_factory=list)
    start: int | None = None
    flops_per_token: int = 0
    bytes_per_token: int = 0
    encoder_flops_per_token: int = 0

    def files(self) -> list[FileEntry]:
        """Its files."""
        return [*([self.gguf] if self.gguf else []), *stage_files(self.parts)]

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(entry.bytes for entry in self.files())

    @property
    def sha256(self) -> str:
        """What names its weights: the hashes of its files."""
        return "+".join(entry.sha256 for entry in self.files())


@dataclass(frozen=True)
class Generation:
    """Decoding defaults. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off.

    `groups` maps a token to those that always follow it: they are never sampled, and forced after it; `group_scale`
    above 1 makes the tokens that they follow likelier (`decoding.rules.favored`). `beams` above 1
    searches instead of sampling, with `length_penalty`. No end and no group comes before `min_tokens`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    repeat_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    min_tokens: int = 0
    groups: dict[str, list[str]] = field(default_factory=dict)
    group_scale: float = 1.0


@dataclass(frozen=True)
class Parity:
    """What was measured against the PyTorch reference: a row per stage and one named `end_to_end`."""

    name: str
    passed: bool
    measured: dict[str, float]
    tolerance: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """The whole of `bundle.json`, schema version 2."""

    system: str
    config: str
    target: str
    created: str
    tool_version: str
    licences: dict[str, str]
    source: dict[str, str]
    tasks: list[str]
    sources: list[Source]
    stages: list[StageEntry]
    tokenizers: list[Tokenizer]
    language_model: LanguageModelEntry
    prompt: Prompt
    generation: Generation
    answers: list[AnswerEntry] = field(default_factory=list)
    extra_files: list[FileEntry] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    build: BuildSettings = field(default_factory=BuildSettings)
    schema: int = SCHEMA

    def files(self) -> list[FileEntry]:
        """Every file that must be in the folder."""
        constants = [source.file for source in self.sources if isinstance(source, Constant)]
        return [*stage_files(self.stages), *self.language_model.files(), *constants, *self.extra_files]

    def stage(self, name: str) -> StageEntry:
        """The stage called `name`. Raises BadInput when the bundle has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise BadInput(f"the bundle has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")

    def engine_stages(self) -> list[StageEntry]:
        """What TensorRT runs: stages, and parts of the language model under their whole names."""
        lm = self.language_model
        parts = [replace(part, name=f"{lm.name}.{part.name}") for part in lm.parts]
        return [stage for stage in (*self.stages, *parts) if stage.engine == "tensorrt"]

    def tokenizer(self, name: str) -> Tokenizer:
        """The tokenizer called `name`. Raises BadInput when the bundle has none."""
        for tokenizer in self.tokenizers:
            if tokenizer.name == name:
                return tokenizer
        raise BadInput(f"the bundle has no tokenizer {name!r}; export it again")


def stage_files(stages: list[StageEntry]) -> Iterator[FileEntry]:
    """Graphs, weights and engines of stages."""
    for stage in stages:
        yield from (stage, *stage.data_files, *stage.engines)
