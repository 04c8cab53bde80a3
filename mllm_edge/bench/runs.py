"""Speed and memory of loaded bundles.

Every repetition shows a picture that the model has not seen and asks after an unrelated prompt, so that each stage and
the prefill really run; where answers have masks, one mask is cut out, too. Decoding is timed on its own, for a given
number of tokens whatever they say.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mllm_edge.bench.limits import measure_limits, shares, warn_if_busy
from mllm_edge.bench.power import Meter, Sensor
from mllm_edge.bench.result import Environment, Limits, Result, Spread, from_document
from mllm_edge.bundle.manifest import Manifest
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import States
from mllm_edge.errors import BadInput, MllmEdgeError, look_up
from mllm_edge.machine.facts import peak_rss
from mllm_edge.runtime.answers.kinds import KINDS
from mllm_edge.runtime.images import load_image
from mllm_edge.runtime.wiring import needed_for
from mllm_edge.targets import TARGETS
from mllm_edge.version import __version__

if TYPE_CHECKING:
    from mllm_edge.progress import Report
    from mllm_edge.runtime import Answer, Model
    from mllm_edge.runtime.engines.interface import LanguageModel

PROMPT = "Describe the picture."
PICTURE_SIZE = 512
ENGINES = ("onnxruntime", "onnxruntime-gpu", "llama-cpp-python", "tensorrt", "tensorrt-rtx")


def measure(
    model: Model,
    name: str,
    *,
    threads: int,
    load_cold_ms: float | None = None,
    limits: Callable[[], Limits | None] = lambda: None,
    repeat: int = 5,
    image: Path | None = None,
    gen_tokens: int = 32,
    sensor: Sensor | None = None,
    report: Report = lambda *_: None,
) -> Result:
    """Measure a freshly loaded model, after one repetition that does not count.

    Args:
        model: the model; its peak memory is the process's.
        name: what to call it in the result.
        threads: how many it was loaded with, for the record.
        load_cold_ms: what `load_cold` said.
        limits: measures the machine's, to compare with; called last, because it takes memory of its own.
        repeat: measured repetitions.
        image: the picture; by default a drawn scene.
        gen_tokens: tokens to decode in each repetition.
        sensor: what tells the power that is drawn meanwhile.
        report: told of each repetition.

    Raises:
        BadInput: an unusable picture or number, or more tokens than the context holds.
    """
    if repeat < 1 or gen_tokens < 1:
        raise BadInput(f"{repeat} repetitions of {gen_tokens} tokens measure nothing; give at least 1 of each")
    warn_if_busy()
    picture = _picture(image)
    runs = []
    for number in range(repeat + 1):
        report(name, number + 1, repeat + 1, None)
        started = time.perf_counter()
        runs.append(_once(model, _altered(picture, number), gen_tokens, sensor))
        report(name, number + 1, repeat + 1, time.perf_counter() - started)
    peak = peak_rss()
    environment = _environment(threads, model, limits())
    result = _result(model, name, gen_tokens, runs[1:], load_cold_ms, peak, environment)
    if sensor is None:
        return result
    joules = [spent for _, _, spent in runs[1:] if not math.isnan(spent)]
    return replace(result, energy_j=_spread(joules), power_sensor=sensor.name) if joules else result


def check_quality(data: str | None, cases: int, curve: Path | None, bundles: Sequence[Path]) -> None:
    """Raises BadInput, before anything long begins, for scores or a curve that these bundles cannot give."""
    from mllm_edge.evaluate.cases import SCENES

    if data is not None and data not in SCENES:
        raise BadInput(f"there is no data set {data!r} for --quality; use {', '.join(SCENES)}")
    if cases < 1:
        raise BadInput(f"{cases} cases score nothing; give at least 1")
    manifests = {path: read_manifest(path, verify_hash=False, engines=False) for path in bundles}
    for path, manifest in manifests.items():
        kinds = {entry.kind for entry in manifest.answers}
        if data and SCENES[data] in ("referring", "grounded") and "masks" not in kinds:
            raise BadInput(f"{path} gives no masks; use scenes-questions")
        if data and SCENES[data] == "regions" and not manifest.prompt.slots_of("boxes"):
            raise BadInput(f"{path} takes no boxes; use scenes-questions")
    tokens = {_picture_tokens(manifest) for manifest in manifests.values()}
    if curve and (data is None or len(tokens) < 2):
        raise BadInput("--curve needs --quality and bundles of different numbers of tokens (export --merge-tokens)")


def measure_quality(result: Result, model: Model, data: str, cases: int, report: Report = lambda *_: None) -> Result:
    """The result with the scores of a data set of scenes that stand for the others.

    Args:
        result: what was measured.
        model: the same bundle, loaded.
        data: a name such as "scenes-questions".
        cases: how many are asked.
        report: told how far it is.
    """
    from mllm_edge.evaluate.cases import scenes
    from mllm_edge.evaluate.run import evaluate
    from mllm_edge.evaluate.show import MAIN, NAMES

    started = time.perf_counter()
    found = evaluate(
        model, scenes(data, cases, "test"), None, False, False, lambda n, total: report(data, 1, 1, None, n / total)
    )
    report(data, 1, 1, time.perf_counter() - started)
    scores = {NAMES[name]: value for name, value in found["scores"].items() if name in MAIN}
    return replace(result, quality=scores, quality_data=f"{data}, {cases} cases")


def uses_gpu(bundle: Path, target: str | None) -> bool:
    """Whether a bundle is to run on a GPU: what the user asks for, or what it was made for."""
    wanted = target or read_manifest(bundle, verify_hash=False, engines=False).target
    return look_up("target", wanted, TARGETS).gpu


def machine_limits(bundle: Path, target: str | None = None) -> Limits | None:
    """The limits of the machine's CPU, None for a bundle that runs elsewhere."""
    return None if uses_gpu(bundle, target) else measure_limits()


def load_cold(bundle: Path, load: Callable[[], Model]) -> float | None:
    """Milliseconds of loading a bundle whose files are not in the page cache.

    Returns:
        None where the system cannot be asked to forget a file.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    for entry in read_manifest(bundle, verify_hash=False).files():
        with (bundle / entry.file).open("rb") as file:
            os.fsync(file.fileno())  # what is not yet written would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with load() as model:
        return model.load_ms


def measure_apart(bundle: Path, options: dict[str, Any]) -> Result:
    """Measure a bundle in a process of its own, so that its peak memory is its own.

    Args:
        bundle: the folder.
        options: of `mllm-edge bench`, by name.

    Raises:
        MllmEdgeError: what the other process said.
    """
    words = [sys.executable, "-m", "mllm_edge", "bench", str(bundle), "--json"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [] if value is None or value is False else [option, str(value)]
    child = subprocess.run(words, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    try:
        told = json.loads(child.stdout)
    except ValueError:
        raise MllmEdgeError(f"measuring {bundle} ended with code {child.returncode}; measure it alone") from None
    if child.returncode != 0:
        raise (BadInput if child.returncode == BadInput.exit_code else MllmEdgeError)(told["error"])
    return from_document(told, str(bundle))[0]


def _picture(image: Path | None) -> NDArray[np.uint8]:
    if image is not None:
        return np.array(load_image(image))
    from mllm_edge.scenes import render as draw
    from mllm_edge.scenes import sample_scene

    return draw(sample_scene("test", 0), PICTURE_SIZE)


def _altered(picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The picture with another first pixel for each number, so that no cache knows it."""
    altered = picture.copy()
    altered[0, 0] = [number >> 16 & 255, number >> 8 & 255, number & 255]
    return altered


def _once(
    model: Model, picture: NDArray[np.uint8], gen_tokens: int, sensor: Sensor | None
) -> tuple[Answer, float, float]:
    """One repetition: an answer of one token, the seconds that decoding `gen_tokens` more took, and the joules of both
    (0 without a sensor)."""
    decoder = model.language_model
    # No prompt begins like the strings that end an answer, so nothing of the KV cache but BOS can be kept.
    model.generate((*model.manifest.prompt.stop, ".")[0], raw=True, max_tokens=1)
    with Meter(sensor) if sensor else contextlib.nullcontext() as meter:
        answer, decoded = _answer(model, decoder, picture, gen_tokens)
    answer = replace(answer, timings={**answer.timings, **_lazy_parts(model, picture)})
    return answer, decoded, meter.joules if meter else 0.0


def _answer(model: Model, decoder: LanguageModel, picture: NDArray[np.uint8], gen_tokens: int) -> tuple[Answer, float]:
    answer = model.generate(PROMPT, picture, max_tokens=1)
    if answer.tokens.prompt + gen_tokens > decoder.context:
        raise BadInput(
            f"{gen_tokens} tokens after a prompt of {answer.tokens.prompt} do not fit the context of "
            f"{decoder.context}; lower --gen-tokens"
        )
    started = time.perf_counter()
    token = answer.tokens.ids[0]
    for _ in range(gen_tokens):
        token = int(decoder.extend([token]).logits.argmax())
    return answer, time.perf_counter() - started


def _lazy_parts(model: Model, picture: NDArray[np.uint8]) -> dict[str, float]:
    """Milliseconds of what only some answers need: a part of each kind that states make, and a question about a box."""
    height, width = picture.shape[:2]
    marks = {source.name: "".join(source.tokens) for source in model.manifest.sources if isinstance(source, States)}
    wanted = dict.fromkeys(getattr(entry, "states", "") for entry in model.manifest.answers)
    asked = [
        model.generate(PROMPT, picture, teacher_forced=marks[name], max_tokens=1) for name in wanted if name in marks
    ]
    for slot in model.manifest.prompt.slots_of("boxes"):
        asked.append(model.generate(slot.placeholder, picture, [(0, 0, width, height)], max_tokens=1))
    names = {stage.name for stage in model.manifest.stages} | set(KINDS)
    return {name: ms for answer in asked for name, ms in answer.timings.items() if name in names and ms > 0}


def _picture_tensors(manifest: Manifest) -> list[str]:
    return [name for slot in manifest.prompt.slots_of("pixels") for name in slot.tensors]


def _picture_tokens(manifest: Manifest) -> int:
    """Positions that a picture takes in the prompt."""
    names = _picture_tensors(manifest)
    shapes = [spec.shape for stage in manifest.stages for spec in stage.outputs if spec.name in names]
    return sum(size for shape in shapes for size in shape[-2:-1] if isinstance(size, int))


def _result(
    model: Model,
    name: str,
    gen_tokens: int,
    runs: Sequence[tuple[Answer, float, float]],
    load_cold_ms: float | None,
    peak: float | None,
    environment: Environment,
) -> Result:
    manifest, answers = model.manifest, [answer for answer, _, _ in runs]
    tokens = answers[0].tokens
    prefilled = tokens.prompt - (model.tokenizer.bos is not None)
    stages = [stage for stage in answers[0].timings if stage not in ("load", "lazy_load", "decode", "total")]
    precisions = [*dict.fromkeys(stage.precision for stage in manifest.stages), manifest.language_model.precision]
    stages_ms = {stage: _spread([answer.timings[stage] for answer in answers]) for stage in stages}
    names = {stage.name for stage in manifest.stages}
    early = needed_for(_picture_tensors(manifest), manifest.stages)
    decode = _spread([gen_tokens / seconds for _, seconds, _ in runs])
    medians = {stage: spread.median for stage, spread in stages_ms.items()}
    limits = environment.limits
    return Result(
        bundle=name,
        system=manifest.system,
        config=manifest.config,
        precision=" + ".join(precisions),
        size_mb=round(sum(entry.bytes for entry in manifest.files()) / 1e6, 3),
        repetitions=len(runs),
        prompt_tokens=tokens.prompt,
        image_tokens=tokens.image,
        generated_tokens=gen_tokens,
        load_cold_ms=None if load_cold_ms is None else round(load_cold_ms, 3),
        load_ms=round(model.load_ms, 3),
        stages_ms=stages_ms,
        first_token_ms=_spread([answer.timings["total"] for answer in answers]),
        prefill_tokens_per_s=_spread([1000 * prefilled / answer.timings["prefill"] for answer in answers]),
        decode_tokens_per_s=decode,
        peak_rss_mb=peak,
        share_of_limit=shares(manifest, limits, medians, prefilled, decode.median) if limits else {},
        environment=environment,
        lazy=[stage for stage in stages if stage in KINDS or (stage in names and stage not in early)],
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(*(round(float(np.percentile(values, share)), 3) for share in (0, 50, 90, 99)))


def _environment(threads: int, model: Model, limits: Limits | None) -> Environment:
    from mllm_edge.machine.facts import cpu_name, gpu_name, version

    on_cpu = not TARGETS[model.target].gpu
    names = [name for name in ENGINES if not (on_cpu and name.startswith("tensorrt"))]
    engines = {engine: found for engine in names if (found := version(engine))}
    versions = {"mllm-edge": __version__, **engines}
    return Environment(
        cpu=cpu_name(),
        threads=threads,
        target=model.target,
        system=platform.platform(),
        python=platform.python_version(),
        versions=versions,
        build=model.language_model.about(),
        limits=limits,
        gpu="" if on_cpu else gpu_name(),
    )
