"""Scenes: objects and a background in coordinates that are independent of the pixel size."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

import numpy as np

Rgb = tuple[int, int, int]
Pair = tuple[str, str]
Item = TypeVar("Item")

COLOR_RGB: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "green": (30, 165, 55),
    "blue": (35, 75, 235),
    "yellow": (250, 225, 30),
    "purple": (145, 35, 190),
    "orange": (250, 130, 10),
    "cyan": (45, 215, 225),
    "white": (244, 244, 244),
}
COLORS: tuple[str, ...] = tuple(COLOR_RGB)
# Drawn scenes have none of these; `recolor` adds them in training. With more than 8 colors, a model that could learn
# pairs of color and shape must learn the two separately.
MORE_COLOR_RGB: dict[str, Rgb] = {
    "pink": (255, 150, 200),
    "teal": (0, 125, 125),
    "lime": (165, 245, 40),
    "navy": (15, 15, 120),
    "tan": (205, 165, 115),
    "brown": (120, 65, 20),
    "silver": (185, 190, 200),
    "violet": (190, 140, 255),
}
ALL_COLORS: tuple[str, ...] = (*COLORS, *MORE_COLOR_RGB)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
RADIUS_RANGES: dict[str, tuple[float, float]] = {"small": (0.075, 0.092), "large": (0.145, 0.18)}
SIZES: tuple[str, ...] = tuple(RADIUS_RANGES)

# One pair for each shape, each with another color, so that every color keeps at least five of its
# six shapes, and every shape seven of its eight colors, in the scenes a model learns from.
HELD_OUT_PAIRS: tuple[Pair, ...] = (
    ("green", "circle"),
    ("purple", "square"),
    ("blue", "triangle"),
    ("red", "star"),
    ("yellow", "cross"),
    ("orange", "ring"),
)


@dataclass(frozen=True)
class SceneObject:
    """One flat shape.

    Attributes:
        color: One of `ALL_COLORS`.
        shape: One of `SHAPES`.
        size: One of `SIZES`.
        x: Center, in picture widths from the left edge (0..1).
        y: Center, in picture heights from the top edge (0..1).
        radius: Nominal radius in lengths of the longer side; no shape reaches farther than `shapes.REACH` radii.
        angle: Clockwise rotation in radians.
        rgb: The exact color drawn, 0..255 each.
        form: Proportions of the shape, 0..1 (see `shapes`); None for the usual ones.
        line: Width of a line along the inside of the edge, in radii; 0 for none.
        line_rgb: The line's color.

    Raises:
        ValueError: The color, shape or size is not one of the known words.
    """

    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float
    angle: float
    rgb: Rgb
    form: float | None = None
    line: float = 0.0
    line_rgb: Rgb = (0, 0, 0)

    def __post_init__(self) -> None:
        for word, known in ((self.color, ALL_COLORS), (self.shape, SHAPES), (self.size, SIZES)):
            if word not in known:
                raise ValueError(f"a scene object cannot be {word!r}; use one of: {', '.join(known)}")

    @property
    def pair(self) -> Pair:
        """The (color, shape) pair that `HELD_OUT_PAIRS` speaks of."""
        return self.color, self.shape


@dataclass(frozen=True)
class Background:
    """The background of a scene.

    Attributes:
        kind: "plain" (only `first`), "gradient" (`first` to `second` along `angle`) or "texture"
            (noise grown from `seed` between `first` and `second`); on wide scenes also "two-tone", "stripes", "checks",
            "paper" (lines of `second` on grainy `first`) or "photo".
        first: A color, 0..255 each.
        second: Another color, 0..255 each.
        angle: Direction of a gradient, of stripes or of the border between two tones, in radians.
        seed: Seed of whatever else is random.
        photo: Name of a photograph (see `photographs`).
    """

    kind: str
    first: Rgb
    second: Rgb
    angle: float
    seed: int
    photo: str = ""

    def digest(self) -> str:
        """Returns the sha256 of the content, in hexadecimal."""
        named = [self.photo] if self.photo else []
        return _sha256([self.kind, self.first, self.second, self.angle, self.seed, *named])


@dataclass(frozen=True)
class Finish:
    """How a wide scene becomes a picture.

    Attributes:
        side: The longer side of the picture in pixels.
        soft: Width of the objects' edges in pixels (1.0 is a smooth edge).
        raster: "distance" (edges `soft` wide) or, by Pillow, "polygons" (smooth edges) or "hard" (steps).
        gain: Factors of red, green and blue.
        gamma: Exponent of the brightness.
        noise: Standard deviation of the noise in gray levels of 255.
        jpeg: Quality of JPEG compression; 0 for none.
    """

    side: int
    soft: float
    raster: str
    gain: tuple[float, float, float]
    gamma: float
    noise: float
    jpeg: int


@dataclass(frozen=True)
class Scene:
    """Objects on a background; later objects lie on top of earlier ones.

    Attributes:
        objects: From the bottom to the top.
        background: What they lie on.
        aspect: Width of the picture relative to its height.
        finish: How a wide scene becomes a picture; None for the others.
    """

    objects: tuple[SceneObject, ...]
    background: Background
    aspect: float = 1.0
    finish: Finish | None = None

    def fingerprint(self) -> str:
        """Returns the sha256 of the whole content, in hexadecimal: equal scenes, equal fingerprints."""
        rows = [[o.color, o.shape, o.size, o.x, o.y, o.radius, o.angle, o.rgb] for o in self.objects]
        if self.finish is None:
            return _sha256([rows, self.background.digest()])
        more = [[o.form, o.line, o.line_rgb] for o in self.objects]
        return _sha256([rows, self.background.digest(), more, self.aspect, astuple(self.finish)])

    def extent(self, size: int) -> tuple[int, int]:
        """Returns width and height in pixels of a picture whose longer side has `size` pixels."""
        if self.aspect >= 1.0:
            return size, max(1, round(size / self.aspect))
        return max(1, round(size * self.aspect)), size

    @property
    def shows_held_out_pair(self) -> bool:
        """Whether some object has one of `HELD_OUT_PAIRS`."""
        return any(item.pair in HELD_OUT_PAIRS for item in self.objects)


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    """Draws one item, each as likely; unlike `rng.choice` it keeps the item's Python type."""
    return items[int(rng.integers(len(items)))]


def shuffled(rng: np.random.Generator, items: Sequence[Item]) -> list[Item]:
    """Returns the items in random order."""
    return [items[i] for i in rng.permutation(len(items))]


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
