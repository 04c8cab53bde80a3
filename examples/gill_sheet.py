"""Sixteen pictures that GILL tiny draws of captions that no recipe of it saw, as one sheet.

    python examples/gill_sheet.py GILL.bundle sheet.png shipped/gill

The upper half are captions of the test split, the lower half of held-out pairs of color and shape, the first of each
without selection. With a judge (`shipped/gill`, or a run of `scene-classifier`) a title is green where it finds exactly
what was asked for, as `mllm-edge eval GILL.bundle scenes-drawings` counts it, and red elsewhere.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

import mllm_edge
from mllm_edge.evaluate.drawings import SEED, asking, drawn, read_judge
from mllm_edge.recipes.data.gill_scenes import few_things

LINE = 34  # letters


def main(bundle: str, png: str, judge: str = "") -> None:
    reads = read_judge(Path(judge)) if judge else None
    figure, axes = pyplot.subplots(4, 4, figsize=(14, 18))
    with mllm_edge.load(bundle) as model:
        for number, axis in enumerate(axes.flat):
            split, index = ("test", "held_out")[number // 8], number % 8
            scene = few_things(split, index, SEED)
            words, color = asking(scene, index), "black"
            picture, free = drawn(model, words, index)
            if reads:
                right = {*reads.names(picture)} == {" ".join(thing.pair) for thing in scene.objects}
                color = "green" if right else "red"
            title = "\n".join(textwrap.wrap(words if free else f"{words} (forced)", LINE))
            axis.imshow(picture)
            axis.set_title(title, color=color, fontsize=9)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(png, dpi=60)


if __name__ == "__main__":
    main(*sys.argv[1:])
