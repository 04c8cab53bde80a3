"""Draw pictures with the model's own answers beside them, right or wrong: how docs/images/demo.png was made.

python examples/card.py build/demo/llava.bundle docs/images/demo.png
"""

from __future__ import annotations

import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

import mllm_edge
from mllm_edge.scenes import SHORT, questions, render, sample_scene

# The first of the test split, which no recipe trains on, that show several objects.
SCENES = [index for index in range(100) if len(sample_scene("test", index).objects) > 1][:4]
KINDS = ("what", "color", "count", "where", "yesno")


def main(bundle: str, png: str) -> None:
    figure, axes = pyplot.subplots(len(SCENES), 2, figsize=(9, 2.3 * len(SCENES)), width_ratios=(1, 3))
    with mllm_edge.load(bundle) as model:
        for (left, right), index in zip(axes, SCENES):
            scene = sample_scene("test", index)
            picture = render(scene, 256)
            left.imshow(picture)
            left.axis("off")
            right.axis("off")
            known = questions(scene, np.random.default_rng(index))
            asked = [question for kind in KINDS for question in [q for q in known if q.kind == kind][:1]]
            for row, question in enumerate(asked):
                answer = model.generate(question.question + SHORT, image=picture, max_tokens=16).text
                wrong = "" if answer == question.answer else f"   (right: {question.answer})"
                high = 0.9 - 0.2 * row
                right.text(0, high, question.question, fontsize=11, va="center")
                right.text(
                    0.72, high, answer + wrong, fontsize=11, va="center", color="tab:red" if wrong else "tab:green"
                )
    figure.tight_layout()
    figure.savefig(png, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
