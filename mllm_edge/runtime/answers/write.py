"""An answer as files: masks over the picture with the text below, its phrases in the colors of their masks; and the
pictures that it holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mllm_edge.runtime.answer import Answer, Mask

# Far apart for most eyes and readable on white (Okabe & Ito 2008, the yellow left out, then darker relatives).
COLORS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (148, 103, 189),
    (140, 86, 75),
    (23, 150, 190),
    (190, 50, 60),
)
TINT = 0.5  # share of a mask's color in the pixels that it covers
SMALLEST = 640  # pixels of the shorter picture's longest side; smaller ones are enlarged, so that text fits below
INK, PAPER = (30, 30, 30), (255, 255, 255)


def write(answer: Answer, folder: Path) -> list[Path]:
    """Write what an answer holds beside text: `overlay.png` and a black and white `mask_N.png` for each mask, in the
    picture's own size, and `image_N.png` for each picture.

    Args:
        answer: the answer.
        folder: made where there is something to write and it does not exist.

    Returns:
        The files, the overlay first; none for an answer of text alone.
    """
    files: list[Path] = []

    def save(picture: Image.Image, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
        files.append(folder / name)

    if answer.masks and answer.picture is not None:
        save(overlay(answer.picture, answer.masks, answer.text), "overlay.png")
    for number, mask in enumerate(answer.masks):
        save(Image.fromarray(mask.pixels), f"mask_{number}.png")
    for number, part in enumerate(answer.images):
        save(part.image, f"image_{number}.png")
    return files


def overlay(picture: Image.Image, masks: Sequence[Mask], text: str) -> Image.Image:
    """The picture under its tinted and outlined masks, and the text below it."""
    scale = max(1, -(-SMALLEST // max(picture.size)))
    pixels = np.asarray(picture.convert("RGB")).astype(np.float32)
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    reach = max(1, round(max(pixels.shape[:2]) / 400))
    for number, mask in enumerate(masks):
        covered = mask.pixels.repeat(scale, axis=0).repeat(scale, axis=1)
        color = np.array(COLORS[number % len(COLORS)], np.float32)
        pixels[covered] = pixels[covered] * (1 - TINT) + color * TINT
        edge = covered & ~_shrunk(covered, reach)
        pixels[edge] = color
    tinted = Image.fromarray(pixels.astype(np.uint8))
    return _with_text(tinted, masks, text)


def _shrunk(mask: NDArray[np.bool_], reach: int) -> NDArray[np.bool_]:
    """The pixels of a mask that are further than `reach` from its border, along rows and columns."""
    inner = mask.copy()
    for axis in (0, 1):
        for step in range(1, reach + 1):
            for sign in (-1, 1):
                moved = np.roll(mask, sign * step, axis)
                border = slice(None, step) if sign > 0 else slice(-step, None)
                moved[(border, slice(None)) if axis == 0 else (slice(None), border)] = False
                inner &= moved
    return inner


def _with_text(picture: Image.Image, masks: Sequence[Mask], text: str) -> Image.Image:
    size = max(16, picture.width // 36)
    font = ImageFont.load_default(size)
    space, pad, line = font.getlength(" "), size // 2, int(size * 1.45)
    places: list[tuple[float, int, str, tuple[int, int, int]]] = []
    x, y = float(pad), pad
    for word, color, apart in _colored(masks, text):
        width = font.getlength(word)
        x += space * apart
        if apart and x + width > picture.width - pad:
            x, y = float(pad), y + line
        places.append((x, y, word, color))
        x += width
    whole = Image.new("RGB", (picture.width, picture.height + y + line + pad), PAPER)
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    for x, y, word, color in places:
        draw.text((x, picture.height + y), word, fill=color, font=font)
        if color != INK:
            bottom = picture.height + y + int(size * 1.2)
            draw.line((x, bottom, x + font.getlength(word), bottom), fill=color, width=max(1, size // 12))
    return whole


def _colored(masks: Sequence[Mask], text: str) -> list[tuple[str, tuple[int, int, int], bool]]:
    """The words of the text with the color of the mask that each is tied to, and whether a space stands before them.

    Punctuation after a phrase is a word of its own. Masks without words follow as numbers.
    """
    ends = sorted({mask.span[1] for mask in masks})
    words: list[tuple[str, tuple[int, int, int], bool]] = []
    for found in re.finditer(r"\S+", text):
        cuts = [found.start(), *(end for end in ends if found.start() < end < found.end()), found.end()]
        for start, end in pairwise(cuts):
            owner = next((n for n, m in enumerate(masks) if m.span[0] <= start < m.span[1]), None)
            color = INK if owner is None else COLORS[owner % len(COLORS)]
            words.append((text[start:end], color, start == found.start() and start > 0))
    for number, mask in enumerate(masks):
        if not mask.phrase:
            words.append((f"mask {number}", COLORS[number % len(COLORS)], True))
    return words
