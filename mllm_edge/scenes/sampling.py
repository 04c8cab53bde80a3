"""Draws scenes for four splits that cannot overlap.

A scene's split is determined by the hash of its background. An edit keeps the background, so an edited
scene stays in its split.
"""

import math
from dataclasses import replace

import numpy as np

from mllm_edge.scenes.legible import is_legible
from mllm_edge.scenes.model import (
    COLOR_RGB,
    COLORS,
    HELD_OUT_PAIRS,
    MORE_COLOR_RGB,
    RADIUS_RANGES,
    SHAPES,
    SIZES,
    Background,
    Pair,
    Rgb,
    Scene,
    SceneObject,
    pick,
)
from mllm_edge.scenes.shapes import REACH

# Of twenty backgrounds, how many belong to each split. The seeds depend on the splits' order.
_SHARES: dict[str, int] = {"train": 14, "validation": 2, "test": 2, "held_out": 2}
SPLITS: tuple[str, ...] = tuple(_SHARES)
_SPLIT_OF_BUCKET = tuple(split for split, share in _SHARES.items() for _ in range(share))

BACKGROUND_KINDS: tuple[str, ...] = ("plain", "gradient", "texture")
MOST_OBJECTS = 4
TRAIN_PAIRS: tuple[Pair, ...] = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS)

_MOST_TURN = math.radians(15)
_COLOR_JITTER = 11
_RECOLORINGS = 1000  # attempts; one or two are enough but for a few wide scenes
_ECHO_RATE = 0.45  # how often an object repeats an earlier color or shape, so that questions need both


def sample_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draws one scene; the same arguments give the same scene on every machine.

    Args:
        split: One of `SPLITS`. A scene of one split never occurs in another, whatever the seeds.
            Scenes of "held_out" have one object with a pair of `HELD_OUT_PAIRS`; others have none.
        index: Number of the scene in its split, from 0.
        seed: Another seed gives another series of scenes.

    Returns:
        A scene of one to four objects that each show at least 60 % of their pixels.

    Raises:
        ValueError: The split is unknown, or the index or seed is negative.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; use one of: {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise ValueError(f"scene index {index} with seed {seed} is not possible; give numbers of 0 or more")
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    background = _sample_background(rng)
    while split_of_background(background) != split:
        background = _sample_background(rng)
    while True:
        scene = Scene(_sample_objects(rng, held_out=split == "held_out"), background)
        if is_legible(scene):
            return scene


def split_of(scene: Scene) -> str:
    """Returns the one split that a scene, or any edit of it, can belong to."""
    return split_of_background(scene.background)


def jittered_rgb(color: str, rng: np.random.Generator) -> Rgb:
    """Returns a shade of a named color that is still clearly that color."""
    exact = COLOR_RGB[color] if color in COLOR_RGB else MORE_COLOR_RGB[color]
    red, green, blue = (min(255, max(0, base + int(rng.integers(-_COLOR_JITTER, _COLOR_JITTER + 1)))) for base in exact)
    return red, green, blue


def recolor(scene: Scene, rng: np.random.Generator) -> Scene:
    """Returns the scene with most of its objects in colors of `MORE_COLOR_RGB`; the others stay as they are.

    On a wide scene's page that hides these colors, it may return the scene itself.
    """

    def one(item: SceneObject) -> SceneObject:
        if rng.random() < 0.4:
            return item
        color = pick(rng, tuple(MORE_COLOR_RGB))
        return replace(item, color=color, rgb=jittered_rgb(color, rng))

    for _ in range(_RECOLORINGS):
        changed = replace(scene, objects=tuple(map(one, scene.objects)))
        looks = [(item.pair, item.size) for item in changed.objects]
        if all(looks.count(look) <= 2 for look in looks) and is_legible(changed):
            return changed
    return scene


def split_of_background(background: Background) -> str:
    """Returns the one split whose scenes may have this background."""
    return _SPLIT_OF_BUCKET[int(background.digest(), 16) % len(_SPLIT_OF_BUCKET)]


def _sample_background(rng: np.random.Generator) -> Background:
    kind = pick(rng, BACKGROUND_KINDS)
    first = _muted_rgb(rng)
    second = first if kind == "plain" else _muted_rgb(rng)
    angle = round(float(rng.uniform(0.0, 2.0 * math.pi)), 3) if kind == "gradient" else 0.0
    seed = int(rng.integers(2**31)) if kind == "texture" else 0
    return Background(kind, first, second, angle, seed)


def _muted_rgb(rng: np.random.Generator) -> Rgb:
    """Returns a dark to middle tone of low saturation, unlike any object color."""
    tone = int(rng.integers(38, 112))
    red, green, blue = (tone + int(rng.integers(-14, 15)) for _ in range(3))
    return red, green, blue


def _sample_objects(rng: np.random.Generator, held_out: bool) -> tuple[SceneObject, ...]:
    count = int(rng.integers(1, MOST_OBJECTS + 1))
    special = int(rng.integers(count)) if held_out else -1
    looks: list[tuple[Pair, str]] = []
    while len(looks) < count:
        pair = pick(rng, HELD_OUT_PAIRS) if len(looks) == special else sample_pair(rng, [p for p, _ in looks])
        look = pair, pick(rng, SIZES)
        # One of two look-alikes is always clearly left of or above the other; with three, perhaps not.
        if looks.count(look) < 2:
            looks.append(look)
    return tuple(_place(pair, size, rng) for pair, size in looks)


def sample_pair(rng: np.random.Generator, earlier: list[Pair]) -> Pair:
    """Draws a pair that is not held out and often repeats an earlier color or shape, so that questions need both."""
    if not earlier or rng.random() > _ECHO_RATE:
        return pick(rng, TRAIN_PAIRS)
    echoed = pick(rng, earlier)
    position = int(rng.integers(2))
    return pick(rng, [pair for pair in TRAIN_PAIRS if pair[position] == echoed[position]])


def _place(pair: Pair, size: str, rng: np.random.Generator) -> SceneObject:
    """Places an object in the picture; four decimals are finer than any pixel we draw."""
    radius = round(float(rng.uniform(*RADIUS_RANGES[size])), 4)
    x, y = (round(float(rng.uniform(REACH * radius, 1.0 - REACH * radius)), 4) for _ in range(2))
    angle = round(float(rng.uniform(-_MOST_TURN, _MOST_TURN)), 4)
    return SceneObject(pair[0], pair[1], size, x, y, radius, angle, jittered_rgb(pair[0], rng))
