"""The manifest (`bundle.json`): the only contract between export and runtime.

A bundle is a folder with `bundle.json` and one file per stage. Everything the runtime knows about a model (shapes,
preprocessing, prompt template, special tokens, hashes, measured parity) is data in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mllm_edge.errors import BadInput

SCHEMA = 1
MANIFEST = "bundle.json"


@dataclass(frozen=True)
class TensorSpec:
    """A named, typed input or output. `shape` is static; a string names an axis that may vary."""

    name: str
    dtype: str
    shape: list[int | str]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle, by its path relative to the bundle's folder."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BuiltEngine(FileEntry):
    """A TensorRT engine of a stage: the package that built it, its version, the GPUs that it is for ("sm_89"), what it
    was built from (`graph_of`), and the lengths of axes that vary (`BuildSettings.profile`; none if none do)."""

    package: str
    version: str
    capabilities: list[str]
    graph: str
    profile: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BuildSettings:
    """How a device builds engines of the stages: the boards that the bundle was made for, the least, usual and greatest
    length of axes that vary, the most scratch memory of a kernel in MB (10^6 bytes; 0 leaves it to TensorRT), and the
    file beside the manifest in which measured kernel times are kept."""

    devices: list[str] = field(default_factory=list)
    profile: list[int] = field(default_factory=lambda: [1, 4, 16])
    workspace_mb: int = 0
    timing_cache: str = "timing.cache"


@dataclass(frozen=True)
class StageEntry(FileEntry):
    """One sub-network and the engine that runs it. Stages are wired to each other by tensor names.

    A stage of engine "tensorrt" has its graph as `file`, and `engines` that were built from it; where there are none,
    the device has to build its own.

    `flops` counts the floating-point operations of its products, `activation_bytes` the most that its graph holds
    between nodes; 0 where nobody counted.
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


@dataclass(frozen=True)
class EmbeddingTable:
    """Where the token embedding lies inside the language model's file, so that the runtime reads single rows of it.

    `dtype` is one of F32, F16, Q8_0; `offset` is in bytes from the start of the file; `shape` is [vocabulary, width].
    """

    dtype: str
    offset: int
    shape: list[int]


@dataclass(frozen=True)
class LanguageModelEntry(FileEntry):
    """The stage that steps. `special_tokens` maps roles (bos, eos, ...) to ids.

    `state_positions` says, for a special token whose hidden state feeds another stage, whether the state is read where
    the token stands ("at") or where it is predicted ("before"). `flops_per_token` counts the operations of the products
    with weights, `bytes_per_token` the weights that one step reads; 0 where nobody counted.
    """

    name: str
    engine: str
    precision: str
    architecture: str
    context_length: int
    hidden_width: int
    layers: int
    kv_width: int
    vocabulary: int
    embedding: EmbeddingTable
    special_tokens: dict[str, int]
    state_positions: dict[str, str] = field(default_factory=dict)
    flops_per_token: int = 0
    bytes_per_token: int = 0


@dataclass(frozen=True)
class ImagePreprocessing:
    """What happens to a picture before the stage named `stage` reads it as tensor `input`.

    The picture is turned to RGB; `fit` is "pad" (centred on a square of colour `pad_color`, then resized), "crop"
    (shortest edge resized to `size`, then the centre is cut out) or "longest" (longest edge resized to `size`, then
    zeros on the right and below). `mean` and `std` apply to values in 0..1.
    """

    stage: str
    input: str
    size: int
    fit: str
    resample: str
    pad_color: list[int]
    mean: list[float]
    std: list[float]


@dataclass(frozen=True)
class Prompt:
    """A chat template as data. `first` and `next` open a user turn with {system} and {text}; `answer` closes the
    assistant's turn with {text}.

    `image` is the placeholder that a picture's embeddings replace, between `image_open` and `image_close`, `box` the
    one of a region's; a phrase that a mask is tied to stands between the two of `phrase`. `image_joint` is put in front
    of a question without a placeholder. Text between placeholders is tokenised piece by piece; `lead` is put before the
    first piece (a tokenizer that adds its own leading space needs none). White space beside a token of `added` is
    dropped, as the slow tokenizers of transformers 4 did.
    """

    name: str
    system: str
    first: str
    next: str
    answer: str
    image: str
    image_joint: str
    lead: str
    stop: list[str]
    image_open: str = ""
    image_close: str = ""
    box: str = ""
    phrase: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Generation:
    """Decoding defaults. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    repeat_penalty: float = 1.0


@dataclass(frozen=True)
class Parity:
    """What was measured against the PyTorch reference: a row per stage and one named `end_to_end`."""

    name: str
    passed: bool
    measured: dict[str, float]
    tolerance: dict[str, float]


@dataclass(frozen=True)
class Manifest:
    """The whole of `bundle.json`, schema version 1."""

    system: str
    config: str
    target: str
    created: str
    tool_version: str
    licences: dict[str, str]
    source: dict[str, str]
    tasks: list[str]
    stages: list[StageEntry]
    language_model: LanguageModelEntry
    preprocessing: list[ImagePreprocessing]
    prompt: Prompt
    generation: Generation
    extra_files: list[FileEntry] = field(default_factory=list)
    parity: list[Parity] = field(default_factory=list)
    build: BuildSettings = field(default_factory=BuildSettings)
    schema: int = SCHEMA

    def files(self) -> list[FileEntry]:
        """Every file that must be in the folder."""
        stages = [entry for stage in self.stages for entry in (stage, *stage.data_files, *stage.engines)]
        return [*stages, self.language_model, *self.extra_files]

    def stage(self, name: str) -> StageEntry:
        """The stage called `name`. Raises BadInput when the bundle has none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise BadInput(f"the bundle has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")
