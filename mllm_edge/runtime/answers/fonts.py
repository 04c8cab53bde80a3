"""Fonts of an overlay's text: Pillow's own, and what it lacks in one of the system's where that has it."""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

Font = ImageFont.FreeTypeFont

FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
# The usual ones, wide before narrow; a font that stands in none of the folders is passed over.
NAMES = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "DroidSansFallbackFull.ttf",
    "wqy-microhei.ttc",
)
_MOST_FILES = 20_000  # of a folder of fonts
_TRIED = 16  # pixels of the letters that are tried


def font_for(word: str, size: int) -> Font:
    """The first font that has all letters of a word, else the one that has most of them."""
    return _font(min(range(len(_files()) + 1), key=lambda place: sum(_lacks(place, letter) for letter in word)), size)


def drawable(letter: str) -> bool:
    """Whether some font shows the letter, and not its box for unknown ones."""
    return letter.isspace() or not all(_lacks(place, letter) for place in range(len(_files()) + 1))


@lru_cache(maxsize=1)
def _files() -> tuple[str, ...]:
    """The system's fonts."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        left = _MOST_FILES
        for where, _, names in os.walk(Path(folder).expanduser()):
            left -= len(names)
            for name in set(NAMES).intersection(names):
                found.setdefault(name, os.path.join(where, name))  # noqa: PTH118  os.walk gives texts
            if left < 0:
                break
    return tuple(found[name] for name in NAMES if name in found and _opens(found[name]))


def _opens(file: str) -> bool:
    try:
        Font(file, _TRIED)  # ImageFont.truetype would look for another file of that name
    except OSError:
        return False
    return True


@lru_cache(maxsize=64)
def _font(place: int, size: int) -> Font:
    """Pillow's own is the first."""
    if place:
        return Font(_files()[place - 1], size)
    font = ImageFont.load_default(size)
    assert isinstance(font, Font)  # what it gives for a size
    return font


@lru_cache(maxsize=1 << 14)
def _lacks(place: int, letter: str) -> bool:
    """Of the system's fonts only letters that stand alone are taken, from left to right: words are set one by one."""
    if letter.isspace():
        return False
    if place and (unicodedata.category(letter)[0] == "M" or unicodedata.bidirectional(letter) in ("R", "AL", "AN")):
        return True
    font = _font(place, _TRIED)
    return bytes(font.getmask(letter)) == bytes(font.getmask("\uffff"))
