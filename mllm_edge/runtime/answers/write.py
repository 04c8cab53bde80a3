"""An answer as files: masks and boxes over the picture with the text below, its phrases in their colors; and the
pictures that it holds. A list of them, `.mllm-edge-answer`, tells the next answer which files are ours to take away."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mllm_edge.errors import BadInput
from mllm_edge.places import no_link, writing
from mllm_edge.runtime.answer import Answer, Mask, TextBox, image_name
from mllm_edge.runtime.answers.fonts import Font, drawable, font_for

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
SMALLEST = 640  # pixels of an overlay's longest side, and of the text's width; smaller pictures are enlarged
LARGEST = 4096  # pixels of an overlay's longest side; it is for people, the masks have the picture's own size
LIST = ".mllm-edge-answer"
_OURS = re.compile(r"overlay\.(png|txt)|(mask|image)_\d+\.png|preview\.png")
Mark = Mask | TextBox
INK, PAPER = (30, 30, 30), (255, 255, 255)


def write(answer: Answer, folder: Path) -> list[Path]:
    """Write what an answer holds beside text: `overlay.png`, a black and white `mask_N.png` in the picture's own size
    for each mask, `image_N.png` for each picture, and `overlay.txt` where the overlay's fonts lack a character of the
    text. The files of the answer before are taken away first.

    Args:
        answer: the answer.
        folder: made where there is something to write and it does not exist.

    Returns:
        The files, the overlay first; none for an answer of text alone.

    Raises:
        BadInput: the folder cannot be written, is a link, or holds files of such names that no answer of ours left.
    """
    clear(folder)
    files: list[Path] = []

    def put(name: str, write_to: Callable[[Path], object]) -> None:
        _put(folder, name, write_to)
        files.append(folder / name)

    with writing(folder):
        marks = [part for part in answer.parts if isinstance(part, (Mask, TextBox))]
        if marks and answer.picture is not None:
            put("overlay.png", overlay(answer.picture, marks, answer.text).save)
            if not all(map(drawable, answer.text)):
                warnings.warn("the overlay's fonts lack characters of the answer; overlay.txt has them", stacklevel=2)
                put("overlay.txt", lambda path: path.write_text(answer.text + "\n", encoding="utf-8"))
        for number, mask in enumerate(answer.masks):
            put(f"mask_{number}.png", Image.fromarray(mask.pixels).save)
        for number, part in enumerate(answer.images):
            put(image_name(number), part.image.save)
    return files


def preview(image: Image.Image, folder: Path) -> None:
    """Write a picture that is not finished as `preview.png`, in the place of the last one and of the files of an
    earlier answer. The finished answer's files replace it. Raises BadInput as `write` does."""
    clear(folder)
    with writing(folder):
        _put(folder, "preview.png", image.save)


def _put(folder: Path, name: str, write_to: Callable[[Path], object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / name).exists() or (folder / name).is_symlink():
        raise BadInput(f"{folder / name} is not from an answer of ours; move it away or give another --out")
    with (folder / LIST).open("a", encoding="utf-8") as names:  # first, so that nothing unlisted stays behind
        names.write(f"{name}\n")
    write_to(folder / name)


def clear(folder: Path) -> None:
    """Take away the files of an earlier answer, which its list names. Nothing else is touched."""
    no_link(folder)
    listed = folder / LIST
    if listed.is_symlink() or not listed.is_file():
        return
    with writing(folder):
        for name in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            if _OURS.fullmatch(name):
                (folder / name).unlink(missing_ok=True)
        listed.unlink()


def overlay(picture: Image.Image, marks: Sequence[Mark], text: str) -> Image.Image:
    """The picture under its tinted and outlined masks and its boxes, and the text below it."""
    scale = max(1, -(-SMALLEST // max(picture.size)))
    size = picture.width * scale, picture.height * scale
    if max(size) > LARGEST:
        longest = max(size)
        size = max(1, size[0] * LARGEST // longest), max(1, size[1] * LARGEST // longest)
    # Copies of pixels where it is enlarged or kept, which is exact; a mask never gets gray borders.
    filter_ = Image.Resampling.NEAREST if scale > 1 or size == picture.size else Image.Resampling.BOX
    pixels = np.asarray(picture.convert("RGB").resize(size, filter_)).astype(np.float32)
    reach = max(1, round(max(size) / 400))
    for number, mask in enumerate(marks):
        if isinstance(mask, TextBox):
            continue
        covered = np.asarray(Image.fromarray(mask.pixels).resize(size, Image.Resampling.NEAREST))
        color = np.array(COLORS[number % len(COLORS)], np.float32)
        pixels[covered] = pixels[covered] * (1 - TINT) + color * TINT
        edge = covered & ~_shrunk(covered, reach)
        pixels[edge] = color
    tinted = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(tinted)
    for number, box in enumerate(marks):
        if isinstance(box, TextBox):
            at = [value * side / of for value, side, of in zip(box.box, size * 2, picture.size * 2, strict=True)]
            draw.rectangle(at, outline=COLORS[number % len(COLORS)], width=2 * reach)
    return _with_text(tinted, marks, text)


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


def _with_text(picture: Image.Image, marks: Sequence[Mark], text: str) -> Image.Image:
    """The picture with the text below, on paper that is wide enough to read it."""
    across = max(picture.width, SMALLEST)
    size = max(16, across // 36)
    plain = font_for("", size)
    space, pad, line = plain.getlength(" "), size // 2, int(size * 1.45)
    places: list[tuple[float, int, str, tuple[int, int, int], Font]] = []
    x, y = float(pad), pad
    for word, color, apart in _colored(marks, text):
        x += space * apart
        font = font_for(word, size)
        for piece in _pieces(word, font, across - 2 * pad):
            width = font.getlength(piece)
            if (apart or piece != word) and x > pad and x + width > across - pad:
                x, y = float(pad), y + line
            places.append((x, y, piece, color, font))
            x += width
    whole = Image.new("RGB", (across, picture.height + y + line + pad), PAPER)
    whole.paste(picture, (0, 0))
    draw = ImageDraw.Draw(whole)
    base = picture.height + plain.getmetrics()[0]  # one for all fonts
    for x, y, word, color, font in places:
        draw.text((x, base + y), word, fill=color, font=font, anchor="ls")
        if color != INK:
            bottom = picture.height + y + int(size * 1.2)
            draw.line((x, bottom, x + font.getlength(word), bottom), fill=color, width=max(1, size // 12))
    return whole


def _pieces(word: str, font: Font, most: float) -> list[str]:
    """A word, in pieces where it is longer than a line."""
    if font.getlength(word) <= most:
        return [word]
    length = max(1, int(most / max(font.getlength(letter) for letter in set(word))))
    return [word[at : at + length] for at in range(0, len(word), length)]


def _colored(marks: Sequence[Mark], text: str) -> list[tuple[str, tuple[int, int, int], bool]]:
    """The words of the text with the color of the mark that each is tied to, and whether a space stands before them.

    Punctuation after a phrase is a word of its own. Masks without words follow as numbers.
    """
    ends = sorted({mark.span[1] for mark in marks})
    words: list[tuple[str, tuple[int, int, int], bool]] = []
    for found in re.finditer(r"\S+", text):
        cuts = [found.start(), *(end for end in ends if found.start() < end < found.end()), found.end()]
        for start, end in pairwise(cuts):
            owner = next((n for n, m in enumerate(marks) if m.span[0] <= start < m.span[1]), None)
            color = INK if owner is None else COLORS[owner % len(COLORS)]
            words.append((text[start:end], color, start == found.start() and start > 0))
    for number, mark in enumerate(marks):
        if isinstance(mark, Mask) and not mark.phrase:
            words.append((f"mask {number}", COLORS[number % len(COLORS)], True))
    return words
