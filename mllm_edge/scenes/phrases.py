"""How objects and places are named, and which names are unambiguous."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from mllm_edge.scenes.model import Scene, SceneObject, shuffled

LOCATIONS: tuple[str, ...] = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
ROWS = 8  # of a picture, for `line_order`
RELATION_MARGIN = 0.12  # how much farther left or up a center must be before we say so
_CELL_MARGIN = 0.04  # a center this far inside its cell of the 3x3 grid has a clear location
_NEIGHBOR_MARGIN = 0.1  # "the object at the top left" needs all others this far outside that cell

_SUPERLATIVES: tuple[tuple[str, str, int], ...] = (
    ("leftmost", "x", 1),
    ("rightmost", "x", -1),
    ("topmost", "y", 1),
    ("bottommost", "y", -1),
)


@dataclass(frozen=True)
class Description:
    """Attributes used to describe an object; None omits one."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def fits(self, item: SceneObject) -> bool:
        """Returns whether the description is true of an object."""
        return self.size in (None, item.size) and self.color in (None, item.color) and self.shape in (None, item.shape)

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape or "object") if word)


def full_description(item: SceneObject) -> Description:
    """Returns the description with size, color and shape."""
    return Description(item.size, item.color, item.shape)


def unique_descriptions(scene: Scene, index: int) -> list[Description]:
    """Returns all descriptions that fit only the object `index`."""
    return [d for d in _true_descriptions(scene.objects[index]) if matches(scene, d) == [index]]


def matches(scene: Scene, description: Description) -> list[int]:
    """Returns the indices of the objects that a description fits."""
    return [i for i, item in enumerate(scene.objects) if description.fits(item)]


def location(item: SceneObject) -> str | None:
    """Returns the object's place in the 3x3 grid, or None if its center is too near to a border."""
    return next((name for name in LOCATIONS if _is_in_cell(item, name, -_CELL_MARGIN)), None)


def cell_center(item: SceneObject) -> tuple[float, float]:
    """Returns x and y of the middle of the grid cell that holds the object's center."""
    return (_cell_of(item.x) + 0.5) / 3, (_cell_of(item.y) + 0.5) / 3


def sole_occupants(scene: Scene) -> dict[str, int]:
    """Returns the locations that hold exactly one object, clearly, with the object's index."""
    found = {}
    for index, item in enumerate(scene.objects):
        name = location(item)
        others = scene.objects[:index] + scene.objects[index + 1 :]
        if name and not any(_is_in_cell(other, name, _NEIGHBOR_MARGIN) for other in others):
            found[name] = index
    return found


def at_location(name: str) -> str:
    """Returns a location as used in a sentence: "at the top left", "in the center", "on the left"."""
    preposition = {"center": "in", "left": "on", "right": "on"}.get(name, "at")
    return f"{preposition} the {name}"


def with_article(noun: str) -> str:
    """Prepends "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capitalized(text: str) -> str:
    """Makes the first letter upper case and leaves all others (`str.capitalize` would not)."""
    return text[:1].upper() + text[1:]


def joined(parts: Sequence[str]) -> str:
    """Lists things: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def reading_order(objects: Sequence[SceneObject]) -> list[int]:
    """Returns the indices from left to right; ties from top to bottom."""
    return sorted(range(len(objects)), key=lambda i: (objects[i].x, objects[i].y, i))


def line_order(objects: Sequence[SceneObject]) -> list[int]:
    """Returns the indices in the order of text: row by row from the top, left to right within a row."""
    return sorted(range(len(objects)), key=lambda i: (int(objects[i].y * ROWS), objects[i].x, i))


def referring_expressions(scene: Scene, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Returns all expressions that refer to exactly one object of a scene.

    By attribute ("the red object", "the small circle"), by rank ("the leftmost circle") and by place
    ("the object at the top left"). Every object of a sampled scene has at least one expression.

    Args:
        scene: The scene.
        rng: Shuffles the result, so that its first entries are a random draw.

    Returns:
        Pairs of an expression and the index of the object it names.
    """
    found = [(f"the {d}", i) for i in range(len(scene.objects)) for d in unique_descriptions(scene, i)]
    found += _superlatives(scene)
    found += [(f"the object {at_location(name)}", index) for name, index in sole_occupants(scene).items()]
    return shuffled(rng, found)


def _superlatives(scene: Scene) -> list[tuple[str, int]]:
    found = []
    for description in _shared_descriptions(scene.objects):
        group = matches(scene, description)
        for word, axis, sign in _SUPERLATIVES:
            ranks = sorted((sign * float(getattr(scene.objects[i], axis)), i) for i in group)
            if ranks[1][0] - ranks[0][0] >= RELATION_MARGIN:
                found.append((f"the {word} {description}", ranks[0][1]))
    return found


def _true_descriptions(item: SceneObject) -> list[Description]:
    """Returns all true descriptions of an object, from the empty to the full one."""
    return [Description(*words) for words in product((None, item.size), (None, item.color), (None, item.shape))]


def _shared_descriptions(objects: Iterable[SceneObject]) -> list[Description]:
    """Returns the descriptions, in a fixed order, that fit two objects or more."""
    counts = Counter(description for item in objects for description in _true_descriptions(item))
    return [description for description, count in counts.items() if count > 1]


def _is_in_cell(item: SceneObject, name: str, margin: float) -> bool:
    """Returns whether the center lies in a cell whose inner borders are moved outward by the margin."""
    row, column = divmod(LOCATIONS.index(name), 3)
    return all(
        (cell == 0 or value >= cell / 3 - margin) and (cell == 2 or value < (cell + 1) / 3 + margin)
        for value, cell in ((item.y, row), (item.x, column))
    )


def _cell_of(value: float) -> int:
    return min(2, int(value * 3))
