"""Speed and memory of loaded bundles.

Every repetition shows a picture that the model has not seen and asks after an unrelated prompt, so that each stage and
the prefill really run. Decoding is timed on its own, for a given number of tokens whatever they say.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import mllm_edge
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError
from mllm_edge.runtime.answer import peak_rss
from mllm_edge.runtime.images import load_image

if TYPE_CHECKING:
    from mllm_edge.runtime import Answer, Model
    from mllm_edge.show import Report

FORMS = ("md", "csv", "json", "jsonl")
PROMPT = "Describe the picture."
PICTURE_SIZE = 512
ENGINES = ("onnxruntime", "onnxruntime-gpu", "llama-cpp-python")


@dataclass(frozen=True)
class Spread:
    """Of the repetitions."""

    min: float
    median: float
    p90: float


@dataclass(frozen=True)
class Environment:
    """What a measurement depends on beside the bundle."""

    cpu: str
    threads: int
    target: str
    system: str
    python: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Result:
    """One bundle's measurements: milliseconds, tokens per second, MB (10^6 bytes).

    `stages_ms` has `preprocess`, the stages in order and `prefill`. `first_token_ms` runs from the call to the first
    token, everything included but loading.
    """

    bundle: str
    system: str
    config: str
    precision: str
    size_mb: float
    repetitions: int
    prompt_tokens: int
    image_tokens: int
    generated_tokens: int
    load_ms: float
    stages_ms: dict[str, Spread]
    first_token_ms: Spread
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    peak_rss_mb: float | None
    environment: Environment


def measure(
    model: Model,
    name: str,
    *,
    threads: int,
    repeat: int = 5,
    image: Path | None = None,
    gen_tokens: int = 32,
    report: Report = lambda *_: None,
) -> Result:
    """Measure a freshly loaded model, after one repetition that does not count.

    Args:
        model: the model; its peak memory is the process's.
        name: what to call it in the result.
        threads: how many it was loaded with, for the record.
        repeat: measured repetitions.
        image: the picture; by default a drawn scene.
        gen_tokens: tokens to decode in each repetition.
        report: told of each repetition.

    Raises:
        BadInput: an unusable picture or number, or more tokens than the context holds.
    """
    if repeat < 1 or gen_tokens < 1:
        raise BadInput(f"{repeat} repetitions of {gen_tokens} tokens measure nothing; give at least 1 of each")
    picture = _picture(image)
    runs = []
    for number in range(repeat + 1):
        report(name, number + 1, repeat + 1, None)
        begun = time.perf_counter()
        runs.append(_once(model, _altered(picture, number), gen_tokens))
        report(name, number + 1, repeat + 1, time.perf_counter() - begun)
    return _result(model, name, threads, gen_tokens, runs[1:])


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
        words += [option] if value is True else [] if value in (None, False) else [option, str(value)]
    child = subprocess.run(words, stdout=subprocess.PIPE, encoding="utf-8", check=False)
    try:
        told = json.loads(child.stdout)
    except ValueError:
        raise MllmEdgeError(f"measuring {bundle} ended with code {child.returncode}; measure it alone") from None
    if child.returncode != 0:
        raise (BadInput if child.returncode == BadInput.exit_code else MllmEdgeError)(told["error"])
    return _from_json(told["results"][0])


def document(results: Sequence[Result]) -> dict[str, Any]:
    """What `mllm-edge bench --json` prints."""
    return {"results": [asdict(result) for result in results]}


def check_form(form: str) -> None:
    """Raises BadInput for a form that `render` does not know."""
    if form not in FORMS:
        raise BadInput(f"there is no output form {form!r}; use {', '.join(FORMS)}")


def render(results: Sequence[Result], form: str) -> str:
    """Results as "md", "csv", "json" or "jsonl", without a line break at the end."""
    check_form(form)
    if form == "json":
        return json.dumps(document(results), indent=2)
    if form == "jsonl":
        return "\n".join(json.dumps(asdict(result)) for result in results)
    return _csv(results) if form == "csv" else _markdown(results)


def plotter(path: Path) -> Callable[[Sequence[Result]], None]:
    """A function that draws the medians by stage, stacked, a bar per bundle. What it needs is checked now.

    Raises:
        BadInput: not the path of a PNG in an existing folder.
        MissingPackage: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise BadInput(f"{path} cannot be drawn to; name a .png in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", "bench")
    return lambda results: _plot(results, path)


def _picture(image: Path | None) -> NDArray[np.uint8]:
    if image is not None:
        return np.array(load_image(image))
    from mllm_edge.recipes.scenes import render as draw
    from mllm_edge.recipes.scenes import sample_scene

    return draw(sample_scene("test", 0), PICTURE_SIZE)


def _altered(picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The picture with another first pixel for each number, so that no cache knows it."""
    altered = picture.copy()
    altered[0, 0] = [number >> 16 & 255, number >> 8 & 255, number & 255]
    return altered


def _once(model: Model, picture: NDArray[np.uint8], gen_tokens: int) -> tuple[Answer, float]:
    """One repetition: an answer of one token, and the seconds that decoding `gen_tokens` more took."""
    decoder = model.language_model
    # No prompt begins like the strings that end an answer, so nothing of the KV cache but BOS can be kept.
    model.generate((*model.manifest.prompt.stop, ".")[0], raw=True, max_tokens=1)
    answer = model.generate(PROMPT, picture, max_tokens=1)
    if answer.tokens.prompt + gen_tokens > decoder.context:
        raise BadInput(
            f"{gen_tokens} tokens behind a prompt of {answer.tokens.prompt} do not fit the context of "
            f"{decoder.context}; lower --gen-tokens"
        )
    begun = time.perf_counter()
    token = answer.tokens.ids[0]
    for _ in range(gen_tokens):
        token = int(decoder.step(token).logits.argmax())
    return answer, time.perf_counter() - begun


def _result(model: Model, name: str, threads: int, gen_tokens: int, runs: Sequence[tuple[Answer, float]]) -> Result:
    manifest, answers = model.manifest, [answer for answer, _ in runs]
    tokens = answers[0].tokens
    read = tokens.prompt - (model.language_model.bos is not None)
    stages = [stage for stage in answers[0].timings if stage not in ("load", "decode", "total")]
    precisions = [*dict.fromkeys(stage.precision for stage in manifest.stages), manifest.language_model.precision]
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
        load_ms=round(model.load_ms, 3),
        stages_ms={stage: _spread([answer.timings[stage] for answer in answers]) for stage in stages},
        first_token_ms=_spread([answer.timings["total"] for answer in answers]),
        prefill_tokens_per_s=_spread([1000 * read / answer.timings["prefill"] for answer in answers]),
        decode_tokens_per_s=_spread([gen_tokens / seconds for _, seconds in runs]),
        peak_rss_mb=peak_rss(),
        environment=_environment(threads, manifest.target),
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(*(round(float(np.percentile(values, share)), 3) for share in (0, 50, 90)))


def _environment(threads: int, target: str) -> Environment:
    from mllm_edge.doctor import cpu_name, version

    engines = {engine: found for engine in ENGINES if (found := version(engine))}
    versions = {"mllm-edge": mllm_edge.__version__, **engines}
    return Environment(cpu_name(), threads, target, platform.platform(), platform.python_version(), versions)


def _from_json(told: dict[str, Any]) -> Result:
    spreads = {key: Spread(**told[key]) for key in ("first_token_ms", "prefill_tokens_per_s", "decode_tokens_per_s")}
    stages = {stage: Spread(**values) for stage, values in told["stages_ms"].items()}
    return Result(**{**told, **spreads, "stages_ms": stages, "environment": Environment(**told["environment"])})


def _rows(result: Result) -> dict[str, str]:
    """A result for people, by the names of its rows."""

    def times(spread: Spread) -> str:
        return f"{spread.median:.1f} ({spread.min:.1f}, {spread.p90:.1f})"

    return {
        "model": f"{result.system} {result.config}",
        "precision": result.precision,
        "size, MB": f"{result.size_mb:.1f}",
        "load, ms": f"{result.load_ms:.0f}",
        **{f"{stage}, ms": times(spread) for stage, spread in result.stages_ms.items()},
        "time to first token, ms": times(result.first_token_ms),
        "prefill, tokens/s": times(result.prefill_tokens_per_s),
        "decode, tokens/s": times(result.decode_tokens_per_s),
        "peak memory, MB": "not told" if result.peak_rss_mb is None else f"{result.peak_rss_mb:.0f}",
    }


def _markdown(results: Sequence[Result]) -> str:
    """A column per bundle, then what the numbers were taken on."""
    columns = [_rows(result) for result in results]
    names = list(dict.fromkeys(name for column in columns for name in column))
    grid = [["median (min, p90)", *(result.bundle.replace("|", "\\|") for result in results)]]
    grid += [[name, *(column.get(name, "") for column in columns)] for name in names]
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in grid]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    first, on = results[0], results[0].environment
    versions = ", ".join(f"{name} {version}" for name, version in on.versions.items())
    return "\n".join(
        [
            *(lines[0], rule, *lines[1:], ""),
            f"{first.repetitions} repetitions; {first.prompt_tokens} tokens of prompt, {first.image_tokens} of them "
            f"for the picture; {first.generated_tokens} tokens decoded.",
            f"{on.cpu}, {on.threads} threads, {on.system}, Python {on.python}, {versions}.",
        ]
    )


def _csv(results: Sequence[Result]) -> str:
    rows = [_flat(asdict(result)) for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().rstrip("\n")


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat


def _plot(results: Sequence[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.6 * len(results)), layout="constrained")
    labels = [Path(result.bundle).name for result in results]
    left = np.zeros(len(results))
    for stage in dict.fromkeys(stage for result in results for stage in result.stages_ms):
        widths = np.array([result.stages_ms[stage].median if stage in result.stages_ms else 0.0 for result in results])
        axes.barh(range(len(results)), widths, left=left, label=stage)
        left += widths
    axes.set_yticks(range(len(results)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds to the first token, median")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
