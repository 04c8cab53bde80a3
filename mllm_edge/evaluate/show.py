"""A table of scores."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mllm_edge.evaluate.scores import PAPER
from mllm_edge.show import table

NAMES = {
    "ciou": "cIoU",
    "giou": "gIoU",
    "answered": "answers with a mask",
    "miou": "mIoU",
    "recall": "mask recall",
    "ap50": "AP50",
    "named": "objects named",
    "all_named": "all objects named",
    "exact": "exact",
    "meteor": "METEOR (no synonyms)",
    "cider": "CIDEr-D",
}


def score_table(bundle: str, result: dict[str, Any]) -> Table:
    """The scores in percent, with those that the paper has for the same kind of data."""
    where, paper = PAPER[result["kind"]]
    made = table(f"{bundle} on {result['dataset']}, {result['cases']} cases", "score", "%", where, right=("%", where))
    for name, value in result["scores"].items():
        made.add_row(NAMES[name], f"{value:.2f}", f"{paper[name]:.1f}" if name in paper else "")
    return made
