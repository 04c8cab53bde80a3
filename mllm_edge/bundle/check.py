"""What a manifest says of itself: paths, numbers, wiring, and the dims that its parts hand to each other.

A manifest is somebody else's text: no number in it reaches an engine that was not checked here, and no tensor is known
here by its name. An input is given by an earlier stage, by a source, or by the loop of a kind of answer.
"""

from __future__ import annotations

import math
import os
import re
import string
from collections.abc import Iterator
from pathlib import Path

from mllm_edge.bundle.answers import AnswerEntry, BoxesAnswer, MasksAnswer, PicturesAnswer, RetrievedAnswer
from mllm_edge.bundle.manifest import MANIFEST, Manifest, StageEntry, TensorSpec
from mllm_edge.bundle.sources import Boxes, Labels, Pixels, States, Task, Text
from mllm_edge.errors import BadInput, look_up
from mllm_edge.targets import BUNDLES

LONGEST = 1 << 20  # of an engine's axis: a language model's are as long as its context
ENGINES = sorted({target.engine for target in BUNDLES.values()})
LANGUAGE_MODELS = {("causal", "gguf"), ("causal", "onnx"), ("seq2seq", "onnx")}  # kind and engine
MOST_PIXELS = 4096  # along a side of what an encoder reads
MOST_TOKENS = 1 << 22  # of a context, a text, a vocabulary
MOST_STEPS = 1000
MOST_LATENT = 1 << 26  # numbers
LONGEST_PATTERN = 200
LONGEST_PATH = 255
QUESTIONS = ("describe", "segment", "locate", "region")
AGAIN = "export the bundle again"


def check(manifest: Manifest, folder: Path) -> None:
    """Check everything that can be checked without opening a weight.

    Raises:
        BadInput: what cannot be; where parts disagree, it names the files of both.
    """
    where = str(folder / MANIFEST)
    for file in (*(entry.file for entry in manifest.files()), manifest.build.timing_cache):
        locate(folder, file)
    for number, (what, most) in _numbers(manifest):
        if not 0 < number <= most:
            raise BadInput(f"{where}: {what} is {number}; it must be 1 to {most}; {AGAIN}")
    for what, number in _counts(manifest):
        if number < 0:
            raise BadInput(f"{where}: {what} is {number}; it must be 0 or more; {AGAIN}")
    for source in manifest.sources:
        if isinstance(source, Pixels):
            _colors(source, where)
    look_up("target", manifest.target, BUNDLES)
    _build(manifest, where)
    made = _wiring(manifest, where)
    _language_model(manifest, folder)
    _prompt(manifest, made, where)
    for entry in manifest.answers:
        _answer(entry, manifest, made, where)


def is_path(text: str, most: int = 4096) -> bool:
    """Whether a system could have a file of that path: neither empty nor longer than `most`, without NUL and halves of
    characters (those that stand for bytes of a name apart)."""
    try:
        return 0 < len(text) <= most and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file of `folder` lies there, links followed; in a cache of the Hugging Face hub its files are links to
    the blobs of the same repository."""
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    places = [home]
    for snapshot in (home, *home.parents):
        if snapshot.parent.name == "snapshots" and re.match("(?:models|datasets)--", snapshot.parent.parent.name):
            places.append(snapshot.parent.parent / "blobs")
    return any(place in real.parents for place in places)


def locate(folder: Path, file: str) -> Path:
    """The path of a bundle's file. Raises BadInput when it would lie outside the bundle's folder."""
    path = folder / file
    if file and not is_path(file, LONGEST_PATH):
        raise BadInput(f"{folder / MANIFEST} names a file that no system can have ({file[:40]!r}...); {AGAIN}")
    if not file or Path(file).is_absolute() or ".." in Path(file).parts or not is_inside(path, folder):
        raise BadInput(f"{folder / MANIFEST} points outside its folder ({file!r}); do not use this bundle")
    return path


def _numbers(manifest: Manifest) -> Iterator[tuple[float, tuple[str, int]]]:
    """Numbers that decide how much memory or time is taken, with what each is and the most that it may be."""
    lm, generation = manifest.language_model, manifest.generation
    yield lm.context, ("language_model.context", MOST_TOKENS)
    yield lm.vocabulary, ("language_model.vocabulary", MOST_TOKENS)
    yield lm.width, ("language_model.width", 1 << 16)
    yield lm.kv_bytes_per_token, ("language_model.kv_bytes_per_token", 1 << 30)
    if lm.gguf:
        yield lm.gguf.layers, ("language_model.gguf.layers", 4096)
        yield lm.gguf.kv_width, ("language_model.gguf.kv_width", 1 << 16)
    yield generation.max_tokens, ("generation.max_tokens", MOST_TOKENS)
    yield generation.beams, ("generation.beams", 64)
    for source in manifest.sources:
        if isinstance(source, Pixels):
            yield source.size, (f"the size of {source.name}", MOST_PIXELS)
        if isinstance(source, Text):
            yield source.length, (f"the length of {source.name}", MOST_TOKENS)
    for entry in manifest.answers:
        if isinstance(entry, MasksAnswer):
            yield entry.frame, ("the frame of masks", MOST_PIXELS)
        if isinstance(entry, PicturesAnswer):
            yield entry.steps, ("the steps of pictures", MOST_STEPS)
            yield entry.train_steps, ("the train_steps of pictures", 100_000)
    for stage in (*manifest.stages, *lm.parts):
        for spec in (*stage.inputs, *stage.outputs):
            for size in spec.shape:
                if isinstance(size, int):
                    yield size, (f"an axis of {stage.name}'s {spec.name}", 1 << 24)


def _counts(manifest: Manifest) -> Iterator[tuple[str, float]]:
    """Numbers that may be 0, with what each is."""
    lm, generation = manifest.language_model, manifest.generation
    yield from (("language_model.flops_per_token", lm.flops_per_token), ("bytes_per_token", lm.bytes_per_token))
    yield "language_model.encoder_flops_per_token", lm.encoder_flops_per_token
    yield from (("generation.temperature", generation.temperature), ("generation.top_k", generation.top_k))
    yield from (("generation.top_p", generation.top_p), ("generation.min_tokens", generation.min_tokens))
    for entry in manifest.files():
        yield f"the size of {entry.file}", entry.bytes
    for stage in (*manifest.stages, *lm.parts):
        yield from ((f"{stage.name}.flops", stage.flops), (f"{stage.name}.activation_bytes", stage.activation_bytes))


def _colors(source: Pixels, where: str) -> None:
    """Raises BadInput where a picture cannot be padded and normalized as the manifest says."""
    numbers = (*source.mean, *source.std)
    if len(source.mean) != 3 or len(source.std) != 3 or not all(map(math.isfinite, numbers)) or 0 in source.std:
        raise BadInput(f"{where}: mean {source.mean} and std {source.std} of {source.name} cannot be; {AGAIN}")
    if len(source.pad_color) != 3 or not all(0 <= part <= 255 for part in source.pad_color):
        raise BadInput(f"{where}: pad_color of {source.name} is {source.pad_color}, not three of 0 to 255; {AGAIN}")


def _build(manifest: Manifest, where: str) -> None:
    build = manifest.build
    for axis, lengths in build.axes.items():
        if len(lengths) != 3 or sorted(lengths) != lengths or not 1 <= lengths[0] <= lengths[2] <= LONGEST:
            raise BadInput(f"{where}: build.axes has {lengths} for {axis}; {AGAIN}")
    run = [*manifest.stages, *manifest.engine_stages()]  # with the parts of a language model that are engines
    free = {size for stage in run for spec in stage.inputs for size in spec.shape if isinstance(size, str)}
    if manifest.target == "trt" and free - set(build.axes):
        raise BadInput(f"{where}: build.axes lacks {', '.join(sorted(free - set(build.axes)))}; {AGAIN}")
    if not build.timing_cache.endswith(".cache") or build.workspace_mb < 0:
        raise BadInput(f"{where}: the build settings {build} cannot be; {AGAIN}")


def _wiring(manifest: Manifest, where: str) -> dict[str, tuple[TensorSpec | None, str]]:
    """What makes each tensor; the spec of one that a source gives is not known here."""
    made: dict[str, tuple[TensorSpec | None, str]] = {}
    sources = [s for s in manifest.sources if not isinstance(s, Labels)]
    loops = [name for entry in manifest.answers if isinstance(entry, PicturesAnswer) for name in _loop(entry)]
    for name, maker in [*((s.name, f"source {s.kind}") for s in sources), *((name, "a loop") for name in loops)]:
        if name in made:
            raise BadInput(f"{where}: {name} is given twice; {AGAIN}")
        made[name] = None, maker
    tokenizers = {tokenizer.name for tokenizer in manifest.tokenizers}
    for source in manifest.sources:
        if isinstance(source, Text) and source.tokenizer not in tokenizers:
            raise BadInput(
                f"{where}: {source.name} is read by tokenizer {source.tokenizer!r}, which is not there; {AGAIN}"
            )
        if isinstance(source, Text) and source.cut not in ("left", "right"):
            raise BadInput(f"{where}: {source.name} is cut on the {source.cut!r}; it can be left or right; {AGAIN}")
        if isinstance(source, States) and (source.at not in ("before", "token") or not source.tokens):
            raise BadInput(
                f"{where}: {source.name} reads states at {source.at!r} of {source.tokens}; "
                f"install mllm-edge >= {manifest.tool_version}"
            )
        if isinstance(source, Task) and not source.values:
            raise BadInput(f"{where}: {source.name} has no values; {AGAIN}")
        if isinstance(source, Task) and not set(source.cues) <= set(source.values):
            raise BadInput(f"{where}: {source.name} has cues for tasks that it has not; {AGAIN}")
    for stage in manifest.stages:
        if stage.engine not in ENGINES:
            raise BadInput(f"{stage.file} asks for engine {stage.engine!r}; known: {', '.join(ENGINES)}")
        for spec in stage.inputs:
            if spec.name not in made:
                raise BadInput(f"nothing before {stage.file} gives its input {spec.name}; {AGAIN}")
            _same_dims(spec, stage.file, *made[spec.name])
            _fits_source(spec, stage, manifest)
        for spec in stage.outputs:
            if spec.name in made:
                raise BadInput(
                    f"{where}: {spec.name} is given twice, by {made[spec.name][1]} and {stage.file}; {AGAIN}"
                )
        made |= {spec.name: (spec, stage.file) for spec in stage.outputs}
    for source in manifest.sources:
        if isinstance(source, Labels):
            _known(source.tensor, f"the words of {{{source.field}}}", made, where)
            if len(source.names) != len(source.thresholds):
                raise BadInput(
                    f"{where}: {source.field} has {len(source.names)} names and {len(source.thresholds)} thresholds"
                )
            if source.around and f"{{{source.field}}}" not in source.around:
                raise BadInput(f"{where}: what goes around {{{source.field}}} is {source.around!r}; {AGAIN}")
    return made


def _loop(entry: PicturesAnswer) -> tuple[str, str, str]:
    return entry.latent, entry.timestep, entry.decoded


def _fits_source(spec: TensorSpec, stage: StageEntry, manifest: Manifest) -> None:
    """Raises BadInput where a stage reads something else than a source gives."""
    source = next((s for s in manifest.sources if not isinstance(s, Labels) and s.name == spec.name), None)
    width = manifest.language_model.width
    if isinstance(source, Pixels) and spec.shape[-2:] != [source.size, source.size]:
        raise BadInput(
            f"preprocessing makes {source.size}x{source.size} pictures but {stage.file} takes {spec.shape}; {AGAIN}"
        )
    if isinstance(source, States) and spec.shape[-1:] != [width]:
        raise BadInput(
            f"{stage.file} takes {spec.name} of width {spec.shape[-1:]} but the language model has {width}; "
            "export both from the same checkpoint"
        )
    if isinstance(source, Boxes) and spec.shape[-1:] != [4]:
        raise BadInput(f"{stage.file} takes boxes {spec.shape}, not [n,4]; {AGAIN}")
    if isinstance(source, Text) and (spec.dtype, spec.shape) != ("int64", [1, source.length]):
        raise BadInput(
            f"{stage.file} takes {spec.name} as {spec.dtype} {spec.shape}, not int64 [1,{source.length}]; {AGAIN}"
        )
    if isinstance(source, Task) and (spec.dtype, spec.shape) != ("int64", [1]):
        raise BadInput(f"{stage.file} takes {spec.name} as {spec.dtype} {spec.shape}, not int64 [1]; {AGAIN}")


def _language_model(manifest: Manifest, folder: Path) -> None:
    lm = manifest.language_model
    if (lm.kind, lm.engine) not in LANGUAGE_MODELS:
        known = ", ".join(f"{kind} by {engine}" for kind, engine in sorted(LANGUAGE_MODELS))
        raise BadInput(f"{folder / MANIFEST}: the language model is {lm.kind} by {lm.engine}; known: {known}")
    manifest.tokenizer(lm.tokenizer)
    files = {entry.file for entry in manifest.files()}
    for tokenizer in manifest.tokenizers:
        locate(folder, tokenizer.file)
        if tokenizer.file not in files or tokenizer.kind not in ("gguf", "json"):
            what = f"{tokenizer.name} ({tokenizer.kind}, {tokenizer.file})"
            raise BadInput(f"{folder / MANIFEST}: tokenizer {what} cannot be; {AGAIN}")
    if (lm.engine == "gguf") != (lm.gguf is not None) or (lm.engine == "onnx") != bool(lm.parts):
        raise BadInput(f"{folder / MANIFEST}: the language model's files are not those of {lm.engine}; {AGAIN}")
    for part in lm.parts:
        if part.engine not in ENGINES:
            raise BadInput(f"{part.file} asks for engine {part.engine!r}; known: {', '.join(ENGINES)}")
    if lm.gguf and lm.gguf.embedding.shape != [lm.vocabulary, lm.width]:
        raise BadInput(f"{lm.gguf.file}: embedding {lm.gguf.embedding.shape} is not [{lm.vocabulary}, {lm.width}]")
    if lm.kind == "seq2seq" and any(isinstance(source, States) for source in manifest.sources):
        raise BadInput(f"{folder / MANIFEST}: a {lm.kind} language model has no states for answers; {AGAIN}")
    if lm.kind == "seq2seq" and (lm.start is None or not 0 <= lm.start < lm.vocabulary):
        raise BadInput(f"{folder / MANIFEST}: the language model starts with token {lm.start}; {AGAIN}")


def _prompt(manifest: Manifest, made: dict[str, tuple[TensorSpec | None, str]], where: str) -> None:
    prompt, lm = manifest.prompt, manifest.language_model
    file = lm.gguf.file if lm.gguf else lm.name
    for template in (prompt.first, prompt.next):
        try:
            list(string.Formatter().parse(template))
        except ValueError as error:
            raise BadInput(
                f"{where}: the prompt's template {template[:40]!r} cannot be read ({error}); {AGAIN}"
            ) from None
    if len({slot.placeholder for slot in prompt.slots} - {""}) != len(prompt.slots):
        raise BadInput(f"{where}: the prompt's placeholders are not all different; {AGAIN}")
    if len(prompt.slots_of("pixels")) > 1:
        raise BadInput(f"{where}: pictures have several placeholders; give one all the tensors; {AGAIN}")
    _questions(manifest, where)
    for slot in prompt.slots:
        if slot.of not in ("pixels", "boxes", "constant") or not slot.tensors:
            raise BadInput(
                f"{where}: {slot.placeholder} stands for {slot.tensors} of {slot.of!r}; "
                f"install mllm-edge >= {manifest.tool_version}"
            )
        for name in slot.tensors:
            spec, maker = _known(name, slot.placeholder, made, where)
            if spec is not None and (spec.shape[-1:] != [lm.width] or len(spec.shape) < 2):
                raise BadInput(
                    f"{maker} gives {name} of width {spec.shape[-1] if spec.shape else 0} but {file} takes {lm.width}; "
                    "export both from the same checkpoint"
                )


def _questions(manifest: Manifest, where: str) -> None:
    prompt, version = manifest.prompt, manifest.tool_version
    spelled = [entry.placeholder for entry in manifest.answers if isinstance(entry, BoxesAnswer) and entry.placeholder]
    places = [*(slot.placeholder for slot in prompt.slots_of("boxes")), *spelled]
    boxes = sum(prompt.questions.get("region", "").count(placeholder) for placeholder in places)
    for name, text in prompt.questions.items():
        if name not in QUESTIONS:
            raise BadInput(f"{where}: there is a question {name!r}; install mllm-edge >= {version}")
        if ("{what}" in text) != (name in ("segment", "locate")) or (name == "region" and boxes != 1):
            raise BadInput(f"{where}: the question {name} is {text!r}, with a wrong place for what is asked; {AGAIN}")


def _answer(entry: AnswerEntry, manifest: Manifest, made: dict[str, tuple[TensorSpec | None, str]], where: str) -> None:
    what = f"answers of kind {entry.kind}"
    if isinstance(entry, BoxesAnswer):
        _pattern(entry, where)
        tasks = {name for source in manifest.sources if isinstance(source, Task) for name in source.values}
        if entry.tasks and (entry.unit != 1 or not 1 <= entry.decimals <= 6 or not set(entry.tasks) <= tasks):
            raise BadInput(f"{where}: tasks {entry.tasks} cannot be answered with boxes like {entry}; {AGAIN}")
        return
    states = {source.name for source in manifest.sources if isinstance(source, States)}
    if entry.states not in states and not (isinstance(entry, PicturesAnswer) and not entry.states):
        raise BadInput(f"{where}: {what} need the states {entry.states!r}, which no source gives; {AGAIN}")
    if isinstance(entry, MasksAnswer):
        _known(entry.logits, what, made, where)
        if len(entry.phrase) not in (0, 2):
            raise BadInput(f"{where}: a phrase stands between two tokens, not {entry.phrase}; {AGAIN}")
    if isinstance(entry, RetrievedAnswer):
        names = filter(None, (entry.query, entry.picture))
        known = {name: _known(name, what, made, where)[0] for name in names}
        query, picture = known[entry.query], known.get(entry.picture)
        if query and picture and query.shape[1:] != picture.shape[1:]:
            raise BadInput(f"{where}: {what} compare {query.shape} with pictures of {picture.shape}; {AGAIN}")
    if isinstance(entry, PicturesAnswer):
        _drawn(entry, manifest, made, where)
    if isinstance(entry, (RetrievedAnswer, PicturesAnswer)) and entry.decision:
        spec, _ = _known(entry.decision, what, made, where)
        if spec is None or spec.shape != [1, 2]:
            raise BadInput(f"{where}: {what} decide by {entry.decision}, which is not a row of two; {AGAIN}")


def _drawn(
    entry: PicturesAnswer, manifest: Manifest, made: dict[str, tuple[TensorSpec | None, str]], where: str
) -> None:
    """Raises BadInput where the loop of a generated picture does not fit its stages."""
    what = f"answers of kind {entry.kind}"
    for stage, gives in ((entry.unet, entry.noise), (entry.vae, entry.pixels)):
        if gives not in [spec.name for spec in manifest.stage(stage).outputs]:
            raise BadInput(f"{where}: {what} need {gives} of stage {stage}, which does not give it; {AGAIN}")
    shapes = {spec.name: spec.shape for spec in manifest.stage(entry.unet).inputs}
    taken = shapes.get(entry.latent, [])
    named = taken[:1] if taken and isinstance(taken[0], str) else [1]
    if entry.timestep not in shapes or [*named, *entry.shape[1:]] != taken or entry.shape[:1] != [1]:
        raise BadInput(f"{where}: stage {entry.unet} takes {shapes}, not a latent of {entry.shape}; {AGAIN}")
    for drop in entry.drops:
        if len(drop) != 2:
            raise BadInput(f"{where}: a condition and what stands for it are two names, not {drop}; {AGAIN}")
        for name in drop:
            _known(name, what, made, where)
    numbers = [entry.latent_scale, *entry.betas, *entry.guidance]
    if len(entry.guidance) != len(entry.drops) or len(entry.betas) != 2 or not all(map(math.isfinite, numbers)):
        raise BadInput(f"{where}: the numbers of {what} cannot be; {AGAIN}")
    if not entry.latent_scale > 0 or not 0 < entry.betas[0] <= entry.betas[1] < 1:
        raise BadInput(f"{where}: the numbers of {what} cannot be; {AGAIN}")
    if math.prod(entry.shape) > MOST_LATENT:
        raise BadInput(f"{where}: a latent of {entry.shape} is more than a machine can draw; {AGAIN}")


def _pattern(entry: BoxesAnswer, where: str) -> None:
    """A regular expression from outside: repeated groups, whose search can take forever, are refused."""
    try:
        groups = re.compile(entry.pattern).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise BadInput(f"{where}: the pattern of boxes is no regular expression ({error}); {AGAIN}") from None
    if groups != 4 or len(entry.pattern) > LONGEST_PATTERN or re.search(r"\)[*+{]", entry.pattern):
        raise BadInput(f"{where}: the pattern of boxes must have four groups, none of them repeated; {AGAIN}")
    if not entry.unit > 0:
        raise BadInput(f"{where}: the unit of boxes is {entry.unit}; {AGAIN}")


def _known(
    name: str, reader: str, made: dict[str, tuple[TensorSpec | None, str]], where: str
) -> tuple[TensorSpec | None, str]:
    if name not in made:
        raise BadInput(f"{where}: no stage and no source gives {name}, which {reader} needs; {AGAIN}")
    return made[name]


def _same_dims(spec: TensorSpec, file: str, made: TensorSpec | None, maker: str) -> None:
    if made is None:
        return
    fixed = [(a, b) for a, b in zip(spec.shape, made.shape) if isinstance(a, int) and isinstance(b, int)]
    if len(spec.shape) != len(made.shape) or any(a != b for a, b in fixed) or spec.dtype != made.dtype:
        raise BadInput(
            f"{maker} gives {spec.name} as {made.dtype} {made.shape} but {file} takes {spec.dtype} {spec.shape}; "
            "export both from the same checkpoint"
        )
