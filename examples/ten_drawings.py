"""Ten drawings as people make them, with the tiny models' answers, right or wrong: how docs/images/tiny.png was made.

    python examples/ten_drawings.py LLAVA.bundle GLAMM.bundle docs/images/tiny.png

Each drawing is a few calls of Pillow. LLaVA is asked a question, GLaMM for the mask of a thing; the answers are judged
by words that were written down with the drawings, and the table for docs/tiny.md is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

matplotlib.use("Agg")
from matplotlib import pyplot

import mllm_edge
from mllm_edge.models.glamm.prompts import SEGMENT_TURNS
from mllm_edge.runtime.answers.write import overlay
from mllm_edge.scenes import SHORT

Pen = ImageDraw.ImageDraw


@dataclass(frozen=True)
class Drawing:
    """What is drawn, a question with its right answer, and what the mask is asked for (if it has a name)."""

    title: str
    page: str
    draw: Callable[[Pen], None]
    question: str
    right: str
    expression: str


def star(pen: Pen, x: float, y: float, radius: float, fill: str) -> None:
    """A five-pointed star around (x, y), one point up."""
    turns = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.4 * radius, radius)
    pen.polygon([*zip(x + reach * np.sin(turns), y - reach * np.cos(turns), strict=True)], fill)


def ball_and_box(pen: Pen) -> None:
    pen.ellipse((60, 150, 260, 350), "red")
    pen.rectangle((380, 170, 560, 350), "blue")


def night(pen: Pen) -> None:
    for x, y, radius in ((140, 110, 45), (330, 220, 30), (520, 120, 55)):
        star(pen, x, y, radius, "yellow")


def house(pen: Pen) -> None:
    pen.rectangle((0, 340, 640, 480), "green")
    pen.rectangle((220, 220, 420, 400), "orange")
    pen.polygon(((190, 220), (450, 220), (320, 90)), "purple")


def lights(pen: Pen) -> None:
    pen.rectangle((250, 40, 390, 440), "#333333")
    for y, fill in ((110, "red"), (240, "yellow"), (370, "green")):
        pen.ellipse((265, y - 55, 375, y + 55), fill)


def outlined(pen: Pen) -> None:
    pen.polygon(((120, 350), (220, 130), (320, 350)), "cyan", "black", 8)
    pen.rectangle((400, 190, 560, 350), "white", "black", 8)


def small(pen: Pen) -> None:
    pen.ellipse((90, 90, 130, 130), "purple")
    pen.ellipse((500, 350, 540, 390), "green")


def overlapping(pen: Pen) -> None:
    pen.ellipse((170, 90, 400, 320), "blue")
    pen.rectangle((320, 220, 520, 420), "yellow")


def rings(pen: Pen) -> None:
    for x, y, tone in (
        (130, 180, "blue"),
        (320, 180, "black"),
        (510, 180, "red"),
        (225, 270, "yellow"),
        (415, 270, "green"),
    ):
        pen.ellipse((x - 80, y - 80, x + 80, y + 80), outline=tone, width=14)


def heart(pen: Pen) -> None:
    pen.pieslice((200, 110, 330, 240), 150, 390, "pink")
    pen.pieslice((310, 110, 440, 240), 150, 390, "pink")
    pen.polygon(((207, 205), (433, 205), (320, 380)), "pink")


def face(pen: Pen) -> None:
    pen.ellipse((170, 70, 470, 370), "yellow", "black", 6)
    for x in (260, 380):
        pen.ellipse((x - 18, 150, x + 18, 200), "black")
    pen.arc((240, 170, 400, 310), 20, 160, "black", 10)


DRAWINGS = (
    Drawing("a ball and a box", "white", ball_and_box, "What color is the circle?", "red", "the red circle"),
    Drawing("a night sky", "black", night, "How many stars are there?", "3", "the small yellow star"),
    Drawing("a house", "skyblue", house, "What shape is the purple object?", "triangle", "the purple triangle"),
    Drawing("traffic lights", "white", lights, "How many circles are there?", "3", "the red circle"),
    Drawing("with black outlines", "beige", outlined, "What color is the square?", "white", "the cyan triangle"),
    Drawing("small things", "white", small, "What color is the circle on the right?", "green", "the purple circle"),
    Drawing("overlapping", "lightgray", overlapping, "What shape is the blue object?", "circle", "the yellow square"),
    Drawing("five linked rings, one black", "white", rings, "How many rings are there?", "5", "the red ring"),
    Drawing("a heart, a shape without a name here", "white", heart, "What is in the picture?", "a heart", ""),
    Drawing("a face, seen as its largest part", "white", face, "What is in the picture?", "a face", ""),
)  # fmt: skip


def main(llava: str, glamm: str, png: str) -> None:
    figure, axes = pyplot.subplots(4, 5, figsize=(15, 11))
    print("| drawing | question | answer | | mask of |\n|---|---|---|---|---|")
    with mllm_edge.load(llava) as chat, mllm_edge.load(glamm) as masks:
        for number, one in enumerate(DRAWINGS):
            picture = Image.new("RGB", (640, 480), one.page)
            one.draw(ImageDraw.Draw(picture))
            said = chat.generate(one.question + SHORT, image=picture, max_tokens=16).text.strip()
            verdict = "right" if said.lower() == one.right else f"wrong: {one.right}"
            row, column = divmod(number, 5)
            shown, cut = axes[2 * row, column], axes[2 * row + 1, column]
            shown.imshow(picture)
            shown.set_title(
                f"{one.question}\n{said}", color="tab:green" if verdict == "right" else "tab:red", fontsize=10
            )
            if one.expression:
                found = masks.generate(SEGMENT_TURNS[0][0].format(one.expression), image=picture, max_tokens=24)
                picture = overlay(picture, found.masks, found.text)
            cut.imshow(picture)
            cut.set_title(one.expression or "(not asked)", fontsize=10)
            shown.axis("off")
            cut.axis("off")
            print(f"| {one.title} | {one.question} | {said} | {verdict} | {one.expression or '-'} |")
    figure.tight_layout()
    figure.savefig(png, dpi=80)


if __name__ == "__main__":
    main(*sys.argv[1:])
