"""Plots quality and time of bundles of one model against their number of image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm_edge.bench.result import Result


def draw_curve(results: Sequence[Result], path: Path) -> None:
    """Draw scores (left, percent) and times (right, median milliseconds) over the tokens of a picture, for results that
    passed `check_quality`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = sorted(results, key=lambda result: result.image_tokens)
    tokens = [result.image_tokens for result in results]
    figure, left = pyplot.subplots(figsize=(7, 4), layout="constrained")
    right = left.twinx()
    for name in results[0].quality:
        left.plot(tokens, [result.quality[name] for result in results], "o-", label=f"{name} (left)")
    times = {
        "time to first token": [result.first_token_ms.median for result in results],
        "prefill": [result.stages_ms["prefill"].median for result in results],
    }
    for (name, medians), form in zip(times.items(), ("s--", "^:")):
        right.plot(tokens, medians, form, color="gray", label=f"{name} (right)")
    left.set_xlabel("tokens of a picture")
    left.set_xticks(tokens)
    left.set_ylabel(f"% on {results[0].quality_data}")
    left.set_ylim(top=100)
    right.set_ylabel("milliseconds, median")
    right.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    left.set_title(f"{results[0].system} {results[0].config}: tokens merged after the connector", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
