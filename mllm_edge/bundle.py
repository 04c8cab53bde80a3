"""The manifest (`bundle.json`): the only contract between export and runtime.

A bundle is a folder with `bundle.json` and one file per stage. Everything the runtime knows about a model (shapes,
preprocessing, prompt template, special tokens, hashes, measured parity) is data in here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from dataclasses import dataclass, field
from pathlib import Path

from mllm_edge.errors import BadInput
from mllm_edge.typed_json import typed

SCHEMA = 1
MANIFEST = "bundle.json"
ENGINES = ("onnx", "tensorrt", "gguf")
TARGETS = ("cpu", "cuda", "trt")


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


def graph_of(stage: StageEntry) -> str:
    """What names a stage's graph and weights: the SHA-256 of its file, or of those of all its files."""
    if not stage.data_files:
        return stage.sha256
    return hashlib.sha256("".join(file.sha256 for file in (stage, *stage.data_files)).encode()).hexdigest()


def file_entry(folder: Path, file: str) -> FileEntry:
    """Size and SHA-256 of `folder/file`."""
    path = folder / file
    return FileEntry(file=file, bytes=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)


def _digest(stream: typing.BinaryIO) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def write(manifest: Manifest, folder: Path) -> None:
    """Write `bundle.json` into `folder`, replacing an older one in one step."""
    check(manifest, folder)
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def read(folder: Path, verify_hash: bool = True, engines: bool = True) -> Manifest:
    """Read and check a bundle's manifest and its files before anything is loaded.

    Args:
        folder: the bundle.
        verify_hash: also compare every file's SHA-256 (sizes are always compared).
        engines: check the files of TensorRT engines, too; only target trt runs them.

    Raises:
        BadInput: no manifest, not JSON, newer schema, wrong or missing fields, a path that leaves the folder,
            dims that disagree between stages, or a file that is missing, truncated or changed.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise BadInput(f"{folder} is not a bundle (it has no {MANIFEST}); make one with: mllm-edge export")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON ({error}); export the bundle again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise BadInput(f"{path} has no schema version; export the bundle again")
    if schema > SCHEMA:
        needs = data.get("tool_version", "a newer version")
        raise BadInput(f"{path} has schema {schema}, this tool reads up to {SCHEMA}; install mllm-edge >= {needs}")
    manifest = typing.cast(Manifest, typed(Manifest, data, str(path)))
    check(manifest, folder)
    built = {engine.file for stage in manifest.stages for engine in stage.engines}
    for entry in manifest.files():
        if engines or entry.file not in built:
            check_file(entry, folder, verify_hash)
    return manifest


def check(manifest: Manifest, folder: Path) -> None:
    """Check what the manifest says of itself: paths, engines and the dims that stages hand to each other.

    Raises:
        BadInput: names the files of both stages that disagree.
    """
    for file in (*(entry.file for entry in manifest.files()), manifest.build.timing_cache):
        locate(folder, file)
    build = manifest.build
    lengths = build.profile
    if len(lengths) != 3 or sorted(lengths) != lengths or not 1 <= lengths[0] <= lengths[2] <= 4096:
        raise BadInput(f"{folder / MANIFEST}: build.profile is {build.profile}; export the bundle again")
    if not build.timing_cache.endswith(".cache") or build.workspace_mb < 0:
        raise BadInput(f"{folder / MANIFEST}: the build settings {build} cannot be; export the bundle again")
    produced: dict[str, tuple[TensorSpec, str]] = {}
    given = {step.input for step in manifest.preprocessing} | {"boxes", "seg_states"}  # of pictures, users, the decoder
    for stage in manifest.stages:
        if stage.engine not in ENGINES:
            raise BadInput(f"{stage.file} asks for engine {stage.engine!r}; known: {', '.join(ENGINES)}")
        for spec in stage.inputs:
            if spec.name in produced:
                _same_dims(spec, stage.file, *produced[spec.name])
            elif spec.name not in given:
                raise BadInput(f"nothing before {stage.file} gives its input {spec.name}; export the bundle again")
        produced.update({spec.name: (spec, stage.file) for spec in stage.outputs})
    lm = manifest.language_model
    states = {
        spec.name: (spec, stage.file) for stage in manifest.stages for spec in stage.inputs if spec.name == "seg_states"
    }
    for name, (spec, file) in {**produced, **states}.items():
        if name in ("image_embeds", "region_embeds", "seg_states") and spec.shape[-1] != lm.hidden_width:
            raise BadInput(
                f"{file} gives or takes {name} of width {spec.shape[-1]} but {lm.file} takes {lm.hidden_width}; "
                "export both from the same checkpoint"
            )
    if len(manifest.prompt.phrase) not in (0, 2) or (manifest.prompt.box and "region_embeds" not in produced):
        raise BadInput(
            f"{folder / MANIFEST}: the prompt's phrases or boxes are not what the stages give; export it again"
        )
    if lm.embedding.shape != [lm.vocabulary, lm.hidden_width]:
        raise BadInput(f"{lm.file}: embedding {lm.embedding.shape} is not [{lm.vocabulary}, {lm.hidden_width}]")
    for step in manifest.preprocessing:
        stage = manifest.stage(step.stage)
        size = next((spec.shape for spec in stage.inputs if spec.name == step.input), None)
        if size is None or size[-2:] != [step.size, step.size]:
            raise BadInput(f"preprocessing makes {step.size}x{step.size} pictures but {stage.file} takes {size}")


def locate(folder: Path, file: str) -> Path:
    """The path of a bundle's file. Raises BadInput when it would lie outside the bundle's folder."""
    path = folder / file
    inside = os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)
    if not file or Path(file).is_absolute() or not inside:
        raise BadInput(f"{folder / MANIFEST} points outside its folder ({file!r}); do not use this bundle")
    return path


def _same_dims(spec: TensorSpec, file: str, made: TensorSpec, maker: str) -> None:
    fixed = [(a, b) for a, b in zip(spec.shape, made.shape) if isinstance(a, int) and isinstance(b, int)]
    if len(spec.shape) != len(made.shape) or any(a != b for a, b in fixed) or spec.dtype != made.dtype:
        raise BadInput(
            f"{maker} gives {spec.name} as {made.dtype} {made.shape} but {file} takes {spec.dtype} {spec.shape}; "
            "export both from the same checkpoint"
        )


def check_file(entry: FileEntry, folder: Path, verify_hash: bool = True) -> None:
    """Raises BadInput where a file is missing or not the one that the manifest has."""
    path = locate(folder, entry.file)
    again = "run: mllm-edge build" if isinstance(entry, BuiltEngine) else "copy or export it again"
    if not path.is_file():
        raise BadInput(f"{path} is missing; {again}")
    if path.stat().st_size != entry.bytes:
        raise BadInput(f"{path} has {path.stat().st_size} bytes, not {entry.bytes}; {again}")
    if verify_hash and sha256(path) != entry.sha256:
        raise BadInput(f"{path} does not match its SHA-256 in {MANIFEST}; {again}")
