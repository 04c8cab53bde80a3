"""What each widening of the scenes brings, on short runs of the encoder: python benchmarks/widenings.py ENCODER

    python benchmarks/widenings.py runs/encoder-pretrain [--steps 300] [--json FILE]

ENCODER is the run (or a folder with `vision_encoder.safetensors`) that every short run starts from; one that has seen
scenes on muted pages alone. A run adds one group of what wide scenes vary: pages, colors, shapes (proportions, turns,
lines), layout (numbers, sizes, aspect) or finish (edges, light, noise, JPEG); "nothing" adds none, "all" all. Each is
then asked for the color and the shape of every covered patch of wide validation scenes, and of drawings by Pillow that
no recipe has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawings import PAGES, Drawing, draw
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.recipe import Recipe, load
from mllm_edge.recipes.tasks.encoder import EncoderTask
from mllm_edge.recipes.trainer import run
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import COLORS, SHAPES, Scene, sample_scene, sample_wide, stands_out
from mllm_edge.scenes.model import Finish
from mllm_edge.scenes.sampling import jittered_rgb

GROUPS = ("pages", "colors", "shapes", "layout", "finish")
USUAL = Finish(128, 1.0, "distance", (1.0, 1.0, 1.0), 1.0, 0.0, 0)
TURN = math.radians(15)
TRIES = 200


def widened(index: int, groups: tuple[str, ...]) -> Scene:
    """Training scene number `index`, wide in the `groups` alone."""
    rng = np.random.default_rng([83, index])
    for attempt in range(TRIES):
        number = index + 1_000_000 * attempt  # another scene where the page hides an object
        old, wide = sample_scene("train", number), sample_wide("train", number)
        base = wide if "layout" in groups else old
        objects = [
            replace(
                item,
                rgb=other.rgb if "colors" in groups and other.color == item.color else jittered_rgb(item.color, rng),
                form=other.form if "shapes" in groups else None,
                line=other.line if "shapes" in groups and other.shape == item.shape else 0.0,
                line_rgb=other.line_rgb,
                angle=other.angle if "shapes" in groups and other.shape == item.shape else _little(item.angle),
            )
            for item, other in ((item, _like(item, wide)) for item in base.objects)
        ]
        background = wide.background if "pages" in groups else old.background
        finish = wide.finish if "finish" in groups else USUAL
        scene = Scene(tuple(objects), background, base.aspect, finish)
        if stands_out(scene):
            return scene
    raise ValueError(f"no scene {index} was found whose page hides nothing")


def _like(item: Any, wide: Scene) -> Any:
    """The wide scene's object that has most in common with `item`."""
    return max(wide.objects, key=lambda other: (other.shape == item.shape) + (other.color == item.color))


def _little(angle: float) -> float:
    return (angle + TURN) % (2 * TURN) - TURN


class WidenedTask(EncoderTask):
    """The encoder's task on scenes that are wide in some groups."""

    def __init__(self, recipe: Recipe, groups: tuple[str, ...]):
        super().__init__(recipe)
        self.groups = groups

    def sample(self, index: int, split: str = "train", wide: float | None = None) -> dict[str, NDArray[Any]]:
        """Half of the scenes are widened."""
        if split != "train" or not self.groups or index % 2:
            return super().sample(index, split, wide)
        return self.labelled(widened(index, self.groups), index, split)


def right(task: EncoderTask, pixel_values: Tensor, labels: dict[str, NDArray[Any]]) -> dict[str, tuple[int, int]]:
    """Of each class, how many patches are right, and of how many."""
    with torch.no_grad():
        out = task.model.predict(pixel_values)
    counts = {}
    for name in ("color", "shape"):
        truth = torch.from_numpy(labels[name])
        seen = truth != IGNORE
        counts[name] = int(((out[name][0].argmax(-1) == truth) & seen).sum()), int(seen.sum())
    return counts


def drawn_labels(task: EncoderTask, one: Drawing) -> dict[str, NDArray[Any]]:
    """Color and shape per patch of a drawing, from its own masks."""
    size, grid = task.dims.image_size, task.model.grid
    owned = []
    for mask in one.masks:
        side = max(mask.shape)
        square = np.zeros((side, side), np.uint8)
        top, left = ((side - length) // 2 for length in mask.shape)
        square[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        small = np.asarray(Image.fromarray(square * 255).resize((size, size), Image.Resampling.BOX), np.float64) / 255
        owned.append(small.reshape(grid, size // grid, grid, size // grid).mean(axis=(1, 3)).ravel())
    shares = np.stack(owned)
    owner = np.where(shares.max(axis=0) >= 0.3, shares.argmax(axis=0), -1)
    words = {
        "color": [COLORS.index(item.color) for item in one.scene.objects],
        "shape": [SHAPES.index(item.shape) for item in one.scene.objects],
    }
    return {name: np.where(owner >= 0, np.array(values)[owner], IGNORE) for name, values in words.items()}


def measure(task: EncoderTask, cases: int) -> dict[str, float]:
    """Shares of covered patches that are right, in %."""
    task.model.eval()
    sums: dict[str, list[int]] = {}

    def add(name: str, counts: dict[str, tuple[int, int]]) -> None:
        for word, (hits, total) in counts.items():
            kept = sums.setdefault(f"{name} {word}", [0, 0])
            kept[0], kept[1] = kept[0] + hits, kept[1] + total

    for series, wide in (("old", 0.0), ("wide", 1.0)):
        for index in range(cases):
            sample = task.sample(index, "validation", wide)
            add(series, right(task, torch.from_numpy(sample["pixel_values"])[None], sample))
    for page in PAGES[:-1]:
        for index in range(cases // 4):
            one = draw(page, index)
            pixel_values = torch.from_numpy(preprocess(one.picture, task.pixels))
            add("drawings", right(task, pixel_values, drawn_labels(task, one)))
    return {name: round(100 * hits / max(1, total), 1) for name, (hits, total) in sums.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", help="folder of the run that all start from")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    sets: dict[str, tuple[str, ...]] = {"nothing": (), **{name: (name,) for name in GROUPS}, "all": GROUPS}
    for name, groups in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            settings = [f"out={folder}/run", f"steps={arguments.steps}", f"batch={arguments.batch}", "evaluate=0"]
            settings += ["lr=4e-4", f"init.vision_encoder={arguments.encoder}", "save_every=100000"]
            recipe = load("encoder-pretrain", settings)
            Path(recipe.out).mkdir()
            task = WidenedTask(recipe, groups)
            run(recipe, task, False, lambda *_: None)
            rows[name] = measure(task, arguments.cases)
            print(name, rows[name], file=sys.stderr)
    columns = list(rows["nothing"])
    table = Table("widened", *columns, title=f"patches that are right, in %, after {arguments.steps} steps")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[column]:.1f}" for column in columns))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
