"""Results for people and for programs: md, csv, json, jsonl, and a plot."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mllm_edge.bench.limits import is_low
from mllm_edge.bench.ratios import Ratio
from mllm_edge.bench.result import Limits, Result, Spread, document
from mllm_edge.errors import BadInput, MissingPackage

if TYPE_CHECKING:
    from rich.table import Table

    from mllm_edge.bench.plan import Plan

FORMS = ("md", "csv", "json", "jsonl")
LOW = " (!)"  # marks a stage that is far below the limit


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


def plotter(
    path: Path, draw: Callable[[Sequence[Result], Path], None] | None = None
) -> Callable[[Sequence[Result]], None]:
    """A function that draws with `draw`, by default stacked medians by stage, one bar per bundle. Its requirements are
    checked now.

    Raises:
        BadInput: not the path of a PNG in an existing folder.
        MissingPackage: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise BadInput(f"{path} cannot be drawn to; name a .png in a folder that exists")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", "bench")
    return lambda results: (draw or _plot)(results, path)


def _rows(result: Result) -> dict[str, str]:
    """A result as text, by row names."""

    def times(spread: Spread, *more: str) -> str:
        told = f"{spread.median:.1f} ({spread.min:.1f}, {spread.p90:.1f}, {spread.p99:.1f})"
        return "; ".join(filter(None, (told, *more)))

    def limit(stage: str) -> str:
        share = result.share_of_limit.get(stage)
        return "" if share is None else f"{100 * share:.0f} % of the limit" + (LOW if is_low(stage, share) else "")

    def part(stage: str) -> str:
        if stage in result.lazy:
            return "when asked for"
        return f"{100 * result.stages_ms[stage].median / result.first_token_ms.median:.0f} % of the time"

    return {
        "model": f"{result.system} {result.config}",
        "precision": result.precision,
        "tokens of prompt (picture)": f"{result.prompt_tokens} ({result.image_tokens})",
        "size, MB": f"{result.size_mb:.1f}",
        "load from disk, ms": "not told" if result.load_cold_ms is None else f"{result.load_cold_ms:.0f}",
        "load again, ms": f"{result.load_ms:.0f}",
        **{f"{stage}, ms": times(spread, part(stage), limit(stage)) for stage, spread in result.stages_ms.items()},
        "time to first token, ms": times(result.first_token_ms),
        "prefill, tokens/s": times(result.prefill_tokens_per_s),
        "decode, tokens/s": times(result.decode_tokens_per_s, limit("decode")),
        **({"energy, J per answer": times(result.energy_j, result.power_sensor)} if result.energy_j else {}),
        **{f"{score}, %": f"{value:.2f} ({result.quality_data})" for score, value in result.quality.items()},
        "peak memory, MB": "not told" if result.peak_rss_mb is None else f"{result.peak_rss_mb:.0f}",
    }


def _markdown(results: Sequence[Result]) -> str:
    """A column per bundle, then the conditions of the measurement."""
    columns = [_rows(result) for result in results]
    names = list(dict.fromkeys(name for column in columns for name in column))
    grid = [["median (min, p90, p99)", *(result.bundle.replace("|", "\\|") for result in results)]]
    grid += [[name, *(column.get(name, "") for column in columns)] for name in names]
    widths = [max(map(len, column)) for column in zip(*grid)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in grid]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    first, on = results[0], results[0].environment
    machine = ", ".join(filter(None, (on.gpu, on.cpu)))
    versions = ", ".join(f"{name} {version}" for name, version in on.versions.items())
    return "\n".join(
        [
            *(lines[0], rule, *lines[1:], ""),
            f"{first.repetitions} repetitions; {first.generated_tokens} tokens decoded.",
            f"{machine}, {on.threads} threads, {on.system}, Python {on.python}, {versions}.",
            f"llama.cpp: {on.build}",
            *(_limits(on.limits, any(LOW in line for line in lines)) if on.limits else ()),
        ]
    )


def _limits(limits: Limits, low: bool) -> list[str]:
    told = [
        f"The limit of a stage: its weights read at {limits.memory_gb_per_s:.1f} GB/s, its products computed at "
        f"{limits.matmul_tflops:.2f} TFLOP/s (fp32), whichever takes longer; both measured here."
    ]
    return told + [f"{LOW.strip()} less than half of what well-tuned engines reach."] * low


def colored(text: str) -> str:
    """A table of `render` for a terminal: stages far below the limit stand out in yellow."""
    return re.sub(r"\d+ % of the limit" + re.escape(LOW), "\x1b[33m\\g<0>\x1b[0m", text)


def ratio_table(ratios: Sequence[Ratio], fail_above: float | None) -> Table:
    """The ratios of `compare`; medians worse than allowed are marked."""
    from mllm_edge.tables import table

    numbers = ("old", "new", "new / old", "may be")
    made = table("above 1 is worse", "bundle", "measure", *numbers, "", right=numbers)
    for ratio in ratios:
        worse = fail_above is not None and ratio.ratio > fail_above
        made.add_row(
            ratio.bundle,
            ratio.measure,
            f"{ratio.old:.1f}",
            f"{ratio.new:.1f}",
            f"{ratio.ratio:.2f}",
            f"{ratio.low:.2f} to {ratio.high:.2f}",
            "WORSE" if worse else "",
            style="yellow" if worse else None,
        )
    return made


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


def plan_tables(plan: Plan) -> list[Table]:
    """A plan as tables: memory, then times."""
    from mllm_edge.tables import pairs, size, table

    device, settings = plan.device, plan.settings
    rows = {
        "model": f"{plan.system} {plan.config}, {settings.precision} + {settings.quant}",
        "machine": f"{device.title}: {device.memory_gb:.1f} GB, of which {plan.free_gb:.1f} GB are for the model; "
        f"{device.memory_gb_per_s:g} GB/s, {device.tflops:g} TFLOP/s",
        "files": ", ".join(f"{name} {size(gb * 1e9)}" for name, gb in plan.files_gb.items()),
        "memory when loaded": f"{plan.load_gb:.2f} GB",
        f"with {settings.context} tokens": f"{plan.full_context_gb:.2f} GB (KV cache {settings.kv_type})",
        "fits": "yes" if plan.fits else f"NO: {plan.advice}",
    }
    numbers = ["GFLOP", "reads", "limit, ms", "expected, ms"]
    with_measured = any(part.measured_ms is not None for part in plan.parts)
    numbers += ["measured, ms", "expected / measured"] * with_measured
    times = table(f"times, {plan.prompt_tokens} tokens of prompt", "stage", *numbers, right=numbers)
    for part in plan.parts:
        cells = [f"{part.gflop:.1f}", size(part.bytes), f"{part.limit_ms:.1f}", f"{part.expected_ms:.1f}"]
        if with_measured:
            known = part.measured_ms
            cells += ["", ""] if known is None else [f"{known:.1f}", f"{part.expected_ms / known:.2f}"]
        name = f"{part.name} (when asked for)" if part.lazy else part.name
        times.add_row(name if name != "decode" else "decode, a token", *cells)
    limit, expected = plan.first_token_ms
    times.add_row("time to first token", "", "", f"{limit:.1f}", f"{expected:.1f}", *[""] * (2 * with_measured))
    return [pairs("plan", rows), times]
