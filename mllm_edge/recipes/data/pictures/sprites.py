"""Named drawings with transparency, in several styles of the same things."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mllm_edge.errors import MissingPackage
from mllm_edge.recipes.data.pictures import archives

GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects")
_UNNAMEABLE = ("time", "place-map", "arrow", "lock")  # subgroups that hold clock faces and the like
_SIDE = 288  # pixels that vector drawings are rendered to


@dataclass(frozen=True)
class Concept:
    """A thing and its drawings.

    Attributes:
        name: Its name without article, such as "red apple".
        names: All correct names, `name` included, in lower case.
        drawings: Style -> function that opens the picture as RGBA.
        symbol: The emoji; empty if there is none.
    """

    name: str
    names: frozenset[str]
    drawings: dict[str, Callable[[], Image.Image]]
    symbol: str = ""


def concepts(folder: Path) -> list[Concept]:
    """Emoji of things in the styles "google", "fluent", "openmoji" and "twitter", and cut-out photographs in the style
    "tuxpaint"; packages are fetched to `folder`.

    Raises:
        MissingPackage: resvg-py, which renders vector drawings, is not installed.
        MllmEdgeError, BadInput: as `archives.fetch` and `archives.unpack`.
    """
    homes = {
        archive.name: archives.unpack(archives.fetch(archive, folder), folder / archive.name.rsplit("/", 1)[-1])
        for archive in (
            archives.GOOGLE,
            archives.TWITTER,
            archives.FLUENT,
            archives.OPENMOJI,
            archives.TUXPAINT,
        )
    }
    return [*_emoji(homes), *_stamps(homes[archives.TUXPAINT.name])]


def _emoji(homes: dict[str, Path]) -> Iterator[Concept]:
    google, twitter = (homes[archive.name] / "package" for archive in (archives.GOOGLE, archives.TWITTER))
    fluent, openmoji = (homes[archive.name] / "package" for archive in (archives.FLUENT, archives.OPENMOJI))
    known = {entry["unified"].lower(): entry for entry in _json(google / "emoji.json")}
    for entry in _json(openmoji / "data" / "openmoji.json"):
        if entry["group"] not in GROUPS or entry["subgroups"] in _UNNAMEABLE or entry["skintone"]:
            continue
        code = entry["hexcode"].lower()
        found = known.get(code) or known.get(f"{code}-fe0f")
        if found is None:
            continue
        unified = found["unified"].lower()
        places = {
            "google": google / "img" / "google" / "64" / f"{unified}.png",
            "twitter": twitter / "img" / "twitter" / "64" / f"{unified}.png",
            "fluent": fluent / "assets" / f"{unified}.webp",
            "openmoji": openmoji / "color" / "svg" / f"{entry['hexcode']}.svg",
        }
        drawings = {style: _opener(path) for style, path in places.items() if path.is_file()}
        names = [entry["annotation"], found["name"], *found["short_names"]]
        yield Concept(plain(entry["annotation"]), frozenset(map(plain, names)), drawings, entry["emoji"])


def _stamps(home: Path) -> Iterator[Concept]:
    root = home / "usr" / "share" / "tuxpaint" / "stamps"
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if "symbols" in path.parts or not text.is_file():
            continue
        name = plain(text.read_text(encoding="utf-8", errors="replace").splitlines()[0])
        if name and len(name.split()) <= 4:
            yield Concept(name, frozenset([name]), {"tuxpaint": _opener(path)})


def plain(name: str) -> str:
    """A name without article, underscores, punctuation and capitals: "A Guinea fowl." becomes "guinea fowl"."""
    words = re.sub(r"[^\w\s'-]", " ", name.replace("_", " ").replace("-", " ").lower()).split()
    return " ".join(words[1:] if words[:1] in (["a"], ["an"], ["the"], ["some"]) and len(words) > 1 else words)


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: _open(path)


def _open(path: Path) -> Image.Image:
    if path.suffix == ".svg":
        try:
            import resvg_py
        except ModuleNotFoundError:
            raise MissingPackage("resvg-py", "pictures") from None
        data = bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=_SIDE, height=_SIDE))
        return _cropped(Image.open(io.BytesIO(data)).convert("RGBA"))
    with Image.open(path) as picture:
        return _cropped(picture.convert("RGBA"))


def _cropped(picture: Image.Image) -> Image.Image:
    """The picture without its empty margin, whose width differs by style."""
    alpha = np.asarray(picture)[..., 3] > 8
    rows, columns = np.flatnonzero(alpha.any(axis=1)), np.flatnonzero(alpha.any(axis=0))
    if not len(rows):
        return picture
    return picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _json(path: Path) -> list[dict]:  # type: ignore[type-arg]
    content: list[dict] = json.loads(path.read_text(encoding="utf-8"))  # type: ignore[type-arg]
    return content
