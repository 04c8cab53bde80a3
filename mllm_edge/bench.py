"""How fast a bundle is on this machine: milliseconds per stage, time to first token, tokens per second, memory.

Every repetition gets a picture with other pixels, so that no cache answers and everything really runs.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import io
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mllm_edge.errors import BadInput, MissingPackage

if TYPE_CHECKING:
    from mllm_edge.runtime import Model

FORMATS = ("md", "csv", "json", "jsonl")
QUESTION = "Describe the picture."
ENGINES = ("onnxruntime", "llama-cpp-python", "numpy")
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Row:
    """One measure of one bundle over `n` repetitions. `unit` is ms, tok/s or MB; p90 is the worse end for ms."""

    bundle: str
    measure: str
    unit: str
    n: int
    min: float
    median: float
    p90: float


def bench(
    bundles: Sequence[Path],
    repetitions: int = 5,
    image: Path | None = None,
    gen_tokens: int = 64,
    threads: int | None = None,
    report: Report = lambda *_: None,
) -> list[Row]:
    """Measure bundles one after the other, with one warm-up each.

    Args:
        bundles: folders.
        repetitions: measured runs per bundle.
        image: the picture; by default noise of the size that the bundle's encoder takes.
        gen_tokens: tokens decoded per run, whatever the model would say.
        threads: CPU threads; by default what `load` chooses.
        report: called with (bundle, run, runs).

    Raises:
        BadInput: less than one repetition or token, more tokens than the context, or an unusable bundle or picture.
    """
    if repetitions < 1 or gen_tokens < 1:
        raise BadInput("bench needs at least one repetition and one token; raise -r or --gen-tokens")
    return [row for folder in bundles for row in _bench_one(folder, repetitions, image, gen_tokens, threads, report)]


def environment(threads: int | None = None) -> dict[str, str]:
    """What the numbers depend on besides the bundle."""
    from mllm_edge import __version__
    from mllm_edge.doctor import cpu_name
    from mllm_edge.runtime.threads import usable_cores

    versions = {name: _version(name) for name in ENGINES}
    return {
        "cpu": cpu_name(),
        "threads": str(threads or usable_cores()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mllm-edge": __version__,
        **versions,
    }


def render(rows: Sequence[Row], form: str, env: dict[str, str]) -> str:
    """The rows as Markdown, CSV, one JSON document or a JSON line per row; the machine readable ones share a schema."""
    data = [dataclasses.asdict(row) for row in rows]
    if form == "json":
        return json.dumps({"environment": env, "rows": data}, indent=2)
    if form == "jsonl":
        return "\n".join(json.dumps({**row, "environment": env}) for row in data)
    if form == "csv":
        stream = io.StringIO()
        writer = csv.DictWriter(stream, [*data[0], *env], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **env} for row in data)
        return stream.getvalue().rstrip("\n")
    if form != "md":
        raise BadInput(f"output {form!r} is not known; use {', '.join(FORMATS)}")
    lines = ["| bundle | measure | unit | min | median | p90 | n |", "|---|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {r.bundle} | {r.measure} | {r.unit} | {r.min:.2f} | {r.median:.2f} | {r.p90:.2f} | {r.n} |" for r in rows
    ]
    return "\n".join([*lines, "", "; ".join(f"{name}: {value}" for name, value in env.items())])


def plot(rows: Sequence[Row], path: Path, env: dict[str, str]) -> None:
    """Stacked median stage times, a bar per bundle, as a PNG. Raises MissingPackage without matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MissingPackage("matplotlib", "bench") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bundles = list(dict.fromkeys(row.bundle for row in rows))
    stages = list(dict.fromkeys(row.measure for row in rows if row.unit == "ms" and row.measure not in _SUMS))
    figure, axis = pyplot.subplots(figsize=(8, 1.5 + 0.6 * len(bundles)), layout="constrained")
    left = np.zeros(len(bundles))
    for stage in stages:
        by_bundle = {row.bundle: row.median for row in rows if row.measure == stage}
        widths = np.array([by_bundle.get(name, 0.0) for name in bundles])
        axis.barh(bundles, widths, left=left, label=stage)
        left += widths
    axis.set(xlabel="ms (medians)", title=f"{env['cpu']}, {env['threads']} threads")
    axis.invert_yaxis()
    axis.legend(ncols=len(stages), loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


_SUMS = ("load", "first_token", "total")


def _bench_one(
    folder: Path, repetitions: int, image: Path | None, gen_tokens: int, threads: int | None, report: Report
) -> list[Row]:
    from mllm_edge.runtime import load
    from mllm_edge.runtime.answer import peak_rss

    samples: dict[str, list[float]] = {}
    name = folder.resolve().name
    with load(folder, threads=threads) as model:
        picture = _picture(model, image)
        for run in range(-1, repetitions):
            report(name, run + 1, repetitions)
            measured = _run(model, _changed(picture, run + 1), gen_tokens)
            if run >= 0:
                for measure, value in measured.items():
                    samples.setdefault(measure, []).append(value)
        rows = [_row(name, "load", "ms", [model.load_ms])]
    units = {"prefill_rate": "tok/s", "decode_rate": "tok/s"}
    rows += [_row(name, measure, units.get(measure, "ms"), values) for measure, values in samples.items()]
    peak = peak_rss()
    return rows if peak is None else [*rows, _row(name, "peak_rss", "MB", [peak])]


def _run(model: Model, picture: np.ndarray, gen_tokens: int) -> dict[str, float]:
    """One question about one unknown picture, then `gen_tokens` steps: milliseconds, and tokens per second."""
    answer = model.generate(QUESTION, image=picture, max_tokens=1)
    prompt = answer.tokens.prompt
    if prompt + gen_tokens > model.language_model.context:
        raise BadInput(
            f"{prompt} prompt positions and {gen_tokens} tokens do not fit the context of "
            f"{model.language_model.context}; lower --gen-tokens"
        )
    timings = {key: value for key, value in answer.timings.items() if key not in ("load", "decode", "total")}
    token = answer.tokens.ids[0]
    start = time.perf_counter()
    for _ in range(gen_tokens):
        token = int(model.language_model.step(token).logits.argmax())
    decode = 1000 * (time.perf_counter() - start)
    first = answer.timings["total"]
    return {
        **timings,
        "decode": decode,
        "first_token": first,
        "total": first + decode,
        "prefill_rate": 1000 * prompt / timings["prefill"],
        "decode_rate": 1000 * gen_tokens / decode,
    }


def _picture(model: Model, image: Path | None) -> np.ndarray:
    if image is not None:
        from mllm_edge.runtime.images import load_image

        return np.asarray(load_image(image))
    size = model.manifest.preprocessing[0].size
    noise: np.ndarray = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return noise


def _changed(picture: np.ndarray, run: int) -> np.ndarray:
    changed = picture.copy()
    changed[0, 0] = (run & 255, run >> 8 & 255, 0)
    return changed


def _row(name: str, measure: str, unit: str, values: list[float]) -> Row:
    worse = sorted(values, reverse=unit == "tok/s")
    at = min(len(worse) - 1, round(0.9 * (len(worse) - 1)))
    return Row(name, measure, unit, len(values), min(values), statistics.median(values), worse[at])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
