"""Where the tiny models go wrong on wide scenes: by the size of things and by how many there are.

    python benchmarks/misses.py LLAVA.bundle GLAMM.bundle [--cases 500] [--json FILE]

The cases are those of `eval BUNDLE wide-referring` and `wide-questions`. A size is the square root of an area, as a
share of the picture's longer side: of the thing that was asked for (masks), or of the smallest one (questions). A mask
is of another thing if its IoU with one that was not asked for is above one half.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import mllm_edge
from mllm_edge.evaluate.cases import scenes
from mllm_edge.runtime import Model
from mllm_edge.runtime.answers.resize import iou
from mllm_edge.scenes import masks, referring_expressions, sample_wide

Row = dict[str, Any]
SIZES = (0.0, 0.06, 0.10, 0.15, 0.20, 1.0)


def cut_out(model: Model, number: int) -> list[Row]:
    """What the masks of things that were asked for share with them."""
    rows = []
    for index, case in enumerate(scenes("wide-referring", number, "test").cases):
        scene, picture = sample_wide("test", index), case.open()
        truth = case.truth(picture).masks[0]
        answer = model.generate(case.question, picture, max_tokens=64)
        found = answer.masks[0].pixels if answer.masks else np.zeros_like(truth)
        _, target = referring_expressions(scene, np.random.default_rng([61, index]))[0]
        side = max(truth.shape)
        others = [one for place, one in enumerate(masks(scene, side)) if place != target]
        rows.append(
            {
                "size": np.sqrt(truth.sum()) / side,
                "things": len(scene.objects),
                "another": any(iou(found, one) > 0.5 for one in others),
                "shared": int((found & truth).sum()),
                "united": int((found | truth).sum()),
            }
        )
    return rows


def answered(model: Model, number: int) -> list[Row]:
    """Whether answers are right."""
    rows = []
    for case in scenes("wide-questions", number, "test").cases:
        scene, picture = sample_wide("test", int(case.name.split()[1])), case.open()
        said = model.generate(case.question, picture, max_tokens=16).text.strip()
        smallest = min(np.sqrt(one.sum()) / max(one.shape) for one in masks(scene, 256))
        right = said == case.truth(picture).texts[0]
        rows.append({"size": smallest, "things": len(scene.objects), "right": right})
    return rows


def masks_told(rows: list[Row]) -> list[str]:
    """Cases, cIoU, and masks of another thing."""
    return [str(len(rows)), f"{100 * ciou(rows):.1f}", f"{100 * np.mean([row['another'] for row in rows]):.1f}"]


def ciou(rows: list[Row]) -> float:
    """Shared over united area."""
    return float(sum(row["shared"] for row in rows) / max(1, sum(row["united"] for row in rows)))


def answers_told(rows: list[Row]) -> list[str]:
    """Cases and right answers."""
    return [str(len(rows)), f"{100 * np.mean([row['right'] for row in rows]):.1f}"]


def told(title: str, columns: list[str], rows: list[Row], tell: Callable[[list[Row]], list[str]]) -> Table:
    """A table by size and by number of things."""
    table = Table("", *columns, title=title)
    spans = itertools.pairwise(SIZES)
    groups = [(f"size {a:.0%} to {b:.0%}", [row for row in rows if a <= row["size"] < b]) for a, b in spans]
    groups += [(f"{number} things", [r for r in rows if r["things"] == number]) for number in range(1, 7)]
    for name, group in [("all", rows), *groups]:
        if group:
            table.add_row(name, *tell(group))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llava")
    parser.add_argument("glamm")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with mllm_edge.load(options.glamm, threads=1) as model:
        found = cut_out(model, options.cases)
    with mllm_edge.load(options.llava, threads=1) as model:
        said = answered(model, options.cases)
    console = Console()
    console.print(told("masks", ["cases", "cIoU %", "of another thing %"], found, masks_told))
    console.print(
        f"cIoU without masks of another thing: {100 * ciou([row for row in found if not row['another']]):.1f}"
    )
    console.print(told("questions", ["cases", "right %"], said, answers_told))
    if options.json:
        options.json.write_text(json.dumps({"masks": found, "questions": said}, default=float), encoding="utf-8")


if __name__ == "__main__":
    main()
