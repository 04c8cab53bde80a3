"""The loss curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path


def draw_losses(log: Path, png: Path, title: str) -> None:
    """Draw the `loss` of a `log.jsonl` over its steps, with the learning rate in the background."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line]
    steps = [row["step"] for row in rows]
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(steps, [row["loss"] for row in rows], color="tab:blue", linewidth=1.2)
    axis.set(xlabel="optimizer step", ylabel="loss", title=title, yscale="log")
    axis.grid(alpha=0.3)
    rate = axis.twinx()
    rate.plot(steps, [row["lr"] for row in rows], color="tab:gray", linewidth=0.8, linestyle="--")
    rate.set_ylabel("learning rate (dashed)")
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
