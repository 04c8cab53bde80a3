"""LION tiny's four tasks on scenes that it was not trained on: how docs/images/lion.png was made.

    python examples/lion_sheet.py LION.bundle docs/images/lion.png

The upper row are scenes of the test split, the lower row wide ones, the first of each without selection. Green is
right, by the same rules as `mllm-edge eval` (a box: IoU of at least 0.5); the box of an answer is solid, that of a
question dashed.
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import Rectangle

import mllm_edge
from mllm_edge.evaluate.cases import scenes
from mllm_edge.evaluate.run import MAX_TOKENS
from mllm_edge.evaluate.scores import Prediction, score

# What is asked, and the score that says whether it is right.
KINDS = {"questions": "exact", "captions": "all_named", "boxes": "box50", "regions": "exact"}
LINE = 46  # letters


def wrapped(text: str) -> str:
    """At most `LINE` letters a line."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > LINE:
            lines.append("")
        lines[-1] += f"{word} "
    return "\n".join(line.strip() for line in lines)


def main(bundle: str, png: str) -> None:
    figure, axes = pyplot.subplots(2, 4, figsize=(18, 11))
    with mllm_edge.load(bundle) as model:
        for row, series in enumerate(("scenes", "wide")):
            for axis, (number, (kind, judge)) in zip(axes[row], enumerate(KINDS.items()), strict=True):
                case = scenes(f"{series}-{kind}", 4, "test").cases[number]
                picture = case.open()
                question = model.question(*case.own) if case.own else case.question
                answer = model.generate(question, picture, case.boxes or None, max_tokens=MAX_TOKENS // 4)
                found = [box["box"] for box in answer.boxes]
                prediction = Prediction(answer.text, [], [], found)
                right = score(kind, [(case.truth(picture), prediction)])[judge] == 100
                axis.imshow(picture)
                for boxes, style in ((case.boxes, "--"), (found, "-")):
                    for x1, y1, x2, y2 in boxes:
                        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ls=style, lw=2, ec="black"))
                axis.set_title(f"{wrapped(question)}\n{wrapped(answer.text)}", color="green" if right else "red")
                axis.axis("off")
    figure.tight_layout()
    figure.savefig(png, dpi=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
