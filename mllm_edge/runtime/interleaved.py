"""Questions in which words and pictures stand in any order: as lists, as files, and taken apart again to be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mllm_edge.bundle.check import is_inside, is_path
from mllm_edge.bundle.manifest import Prompt
from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput
from mllm_edge.runtime.asked import Images
from mllm_edge.runtime.images import MAX_PIXELS, ImageSource, load_image

Question = str | Sequence[ImageSource]  # words; or parts in any order, of which a str is words and all else a picture
MOST_BYTES = 1 << 20  # of a file of parts
MOST_PARTS = 1000
MOST_PIXELS = 2 * MAX_PIXELS  # of all pictures of a file together; they are in memory at once
FORM = 'write a text, {"text": ...} or {"image": FILE}'


def words_and_pictures(question: Question, images: Images, template: Prompt, raw: bool = False) -> tuple[str, Images]:
    """A question as words with the template's placeholder where a picture stands, and the pictures.

    Pictures in front of all words stand there as the template has it (`Slot.joint`); texts side by side are joined as
    they are.

    Args:
        question: words, which may have placeholders; or parts.
        images: the pictures of words.
        template: the bundle's.
        raw: the question is the whole prompt, and no template is around it.

    Raises:
        BadInput: parts and pictures beside them, a placeholder in a part, or a picture where the template has no place
            for one.
    """
    if isinstance(question, str):
        return question, images
    if images is not None and not (isinstance(images, (list, tuple)) and not images):
        raise BadInput("the parts of the prompt hold its pictures; leave out those beside them")
    slots, words, pictures = template.slots_of("pixels"), "", list[ImageSource]()
    fixed = not raw and any(slot.placeholder in text for slot in slots for text in (template.first, template.next))
    begun = False
    for number, part in enumerate(question, 1):
        if isinstance(part, str):
            if found := [slot.placeholder for slot in slots if slot.placeholder in part]:
                raise BadInput(
                    f"part {number} of the prompt has {found[0]} in its words; make the picture its own part"
                )
            words, begun = words + part, begun or bool(part)
            continue
        pictures.append(part)
        if not slots:
            raise BadInput(f"this bundle takes no pictures, and part {number} of the prompt is one; leave it out")
        if (fixed or len(slots) > 1) and begun:
            raise BadInput(
                f"part {number} of the prompt is a picture behind words, and this bundle's prompt has a place of its "
                "own for pictures; put them first"
            )
        if not fixed and len(slots) == 1:
            words += slots[0].placeholder if begun or raw else slots[0].joint
    return words, pictures


def apart(words: str, pictures: Sequence[Image.Image], template: Prompt) -> list[str | Image.Image]:
    """The parts of a question: its words, cut where pictures stand in them; else the pictures are in front."""
    placeholders = [re.escape(slot.placeholder) for slot in template.slots_of("pixels")]
    texts = re.split("|".join(placeholders), words) if placeholders else [words]
    if len(texts) != len(pictures) + 1:
        return [*pictures, words]
    found: list[str | Image.Image] = [texts[0]]
    for picture, text in zip(pictures, texts[1:]):
        found += [picture, text]
    return [part for part in found if part != ""]


def read_parts(path: Path) -> list[str | Image.Image]:
    """The parts of a question in a file: a JSON list of texts, `{"text": ...}` and `{"image": FILE}`, pictures relative
    to the file and not outside its folder.

    Raises:
        BadInput: it is no such list, is empty, too long, or has a picture that cannot be read.
    """
    try:
        document = json.loads(read_text(path, MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); write a list of texts and pictures") from None
    if not isinstance(document, list) or not 0 < len(document) <= MOST_PARTS:
        raise BadInput(f"{path} is no list of 1 to {MOST_PARTS} texts and pictures; write one")
    parts, pixels = list[str | Image.Image](), 0
    for number, item in enumerate(document, 1):
        part = _part(item, path, number)
        if isinstance(part, Image.Image):
            pixels += part.width * part.height
        if pixels > MOST_PIXELS:
            raise BadInput(
                f"{path}: its pictures have over {MOST_PIXELS // 10**6} Mpixel up to item {number}; use fewer"
            )
        parts.append(part)
    return parts


def _part(item: Any, path: Path, number: int) -> str | Image.Image:
    kind, value = ("text", item) if isinstance(item, str) else ("", None)
    if isinstance(item, dict) and len(item) == 1:
        ((kind, value),) = item.items()
    if kind not in ("text", "image") or not isinstance(value, str):
        raise BadInput(f"{path}: item {number} is no text and no picture; {FORM}")
    if kind == "text":
        return value
    file = path.parent / value
    if not is_path(value) or not is_inside(file, path.parent):
        raise BadInput(f"{path}: item {number} names {value[:80]!r}, which is not in the file's folder; copy it there")
    try:
        return load_image(file)
    except BadInput as error:
        raise BadInput(f"{path}: item {number}: {' '.join(str(error).split())}") from None
