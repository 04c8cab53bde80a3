"""A table of scores."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from mllm_edge.evaluate.cases import SCENES
from mllm_edge.evaluate.scores import PAPER
from mllm_edge.tables import table

MAIN = ("ciou", "miou", "all_named", "exact", "box50", "vqa")  # shown where there is room for one or two
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
    "box50": "accuracy at IoU 0.5",
    "box75": "accuracy at IoU 0.75",
    "box_iou": "mean IoU of boxes",
    "box_answered": "answers with a box",
    "vqa": "VQA accuracy",
    "drawn_objects": "objects with the asked color and shape",
    "drawn_pictures": "pictures with exactly these",
    "drawn_freely": "answers with a picture, not forced",
    "judge_objects": "the same objects in the scenes' own pictures",
    "judge_pictures": "pictures with exactly these, of the scenes' own",
    **{f"text_to_image_{most}": f"R@{most}, pictures by words" for most in (1, 5, 10)},
    **{f"image_to_text_{most}": f"R@{most}, words by pictures" for most in (1, 5, 10)},
    "decided": "decisions",
    "decided_f1": "decisions, macro F1",
}


def score_table(bundle: str, result: dict[str, Any]) -> Table:
    """The scores in percent; those of a file stand beside the paper's for that kind of data."""
    ours = result["dataset"].partition(" ")[0] in SCENES
    where, paper = ("", {}) if ours else PAPER.get(result["kind"], ("", {}))
    columns = ["%", *([where] if where else [])]
    made = table(f"{bundle} on {result['dataset']}, {result['cases']} cases", "score", *columns, right=tuple(columns))
    for name, value in result["scores"].items():
        cells = [f"{value:.2f}", f"{paper[name]:.1f}" if name in paper else ""]
        made.add_row(NAMES[name], *cells[: len(columns)])
    return made
