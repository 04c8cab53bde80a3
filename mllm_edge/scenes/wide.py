"""Wide scenes: drawings as other programs and people make them, on pages of any lightness and color.

They share the splits, the words and the held-out pairs of the scenes in `sampling`, and their seeds are their own, so
that the other scenes stay what they are.
"""

import colorsys
import math

import numpy as np

from mllm_edge.scenes.legible import coarse_page, contrasts, is_legible, touching
from mllm_edge.scenes.model import (
    HELD_OUT_PAIRS,
    SIZES,
    Background,
    Finish,
    Pair,
    Rgb,
    Scene,
    SceneObject,
    pick,
)
from mllm_edge.scenes.photographs import available
from mllm_edge.scenes.sampling import SPLITS, sample_pair, sample_scene, split_of_background
from mllm_edge.scenes.shapes import REACH, thickness

MOST_OBJECTS = 6
WIDE_RADII: dict[str, tuple[float, float]] = {"small": (0.03, 0.095), "large": (0.13, 0.2)}
LONGEST = 2.0  # the longer side in lengths of the shorter one
# Shares of the kinds of pages; without photographs the others share theirs.
PAGES: dict[str, float] = {
    "plain": 0.32,
    "two-tone": 0.15,
    "gradient": 0.13,
    "texture": 0.12,
    "paper": 0.10,
    "stripes": 0.03,
    "checks": 0.03,
    "photo": 0.12,
}

_COUNTS = (0.20, 0.21, 0.20, 0.16, 0.12, 0.11)
# Hue in degrees, saturation and value of each color: what people call by this name without hesitation.
_HUES: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-9, 7), (0.78, 1.0), (0.65, 1.0)),
    "green": ((98, 145), (0.55, 1.0), (0.42, 0.95)),
    "blue": ((212, 243), (0.65, 1.0), (0.5, 1.0)),
    "yellow": ((49, 61), (0.72, 1.0), (0.88, 1.0)),
    "purple": ((272, 303), (0.6, 1.0), (0.45, 0.85)),
    "orange": ((21, 39), (0.82, 1.0), (0.9, 1.0)),
    "cyan": ((175, 191), (0.6, 1.0), (0.8, 1.0)),
    "white": ((0, 360), (0.0, 0.03), (0.94, 1.0)),
}
_TURNS = {"square": math.radians(25), "cross": math.radians(18), "triangle": math.pi, "star": math.pi}
_SIDES = (128, 256)  # pixels of the longer side; the tiny models see 128
_TRIES = 60
_REPEATING = 0.15  # share of scenes whose objects are mostly alike; in others two are so at most


def sample_wide(split: str, index: int, seed: int = 0, objects: int | None = None) -> Scene:
    """Draws one wide scene; the same arguments give the same scene on every machine with the same photographs.

    Args:
        split: One of `SPLITS`; photographs and backgrounds of one never occur in another.
        index: Number of the scene in its split, from 0.
        seed: Another seed gives another series.
        objects: How many; None draws 1 to 6.

    Returns:
        A scene whose objects each show at least 60 % of their pixels and differ from the page in color.

    Raises:
        ValueError: The split is unknown, the index or seed negative, or so many objects do not fit.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; use one of: {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise ValueError(f"scene index {index} with seed {seed} is not possible; give numbers of 0 or more")
    if objects is not None and not 1 <= objects <= MOST_OBJECTS:
        raise ValueError(f"{objects} objects do not fit in a scene; ask for 1 to {MOST_OBJECTS}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(SPLITS) + SPLITS.index(split), index]))
    photographs = available(split)
    for _ in range(_TRIES):
        background = _sample_page(rng, photographs)
        while split_of_background(background) != split:
            background = _sample_page(rng, photographs)
        aspect = 1.0 if rng.random() < 0.5 else round(math.exp(rng.uniform(-1, 1) * math.log(LONGEST)), 3)
        count = objects or 1 + int(rng.choice(MOST_OBJECTS, p=_COUNTS))
        empty = Scene((), background, aspect, _sample_finish(rng))
        scene = _filled(empty, count, split == "held_out", rng)
        if scene is not None:
            return scene
    raise ValueError(f"{count} objects do not fit in scene {index} of {split}; ask for fewer")


def mixed_scene(split: str, index: int, seed: int, wide: float) -> Scene:
    """Draws a wide scene with probability `wide`, else one of `sample_scene`; the same for the same arguments."""
    drawn = np.random.default_rng(np.random.SeedSequence([seed, 3 * len(SPLITS), index])).random() < wide
    return (sample_wide if drawn else sample_scene)(split, index, seed)


def _filled(empty: Scene, count: int, held_out: bool, rng: np.random.Generator) -> Scene | None:
    """The scene with `count` objects, or None if they were not found a place."""
    special = int(rng.integers(count)) if held_out else -1
    lined = rng.random() < 0.25
    crowded = rng.random() < 0.3  # objects may overlap
    again = rng.random() < _REPEATING  # most objects are alike, as three stars in a row
    ground = coarse_page(empty)
    scene = empty
    for _ in range(_TRIES):
        number = len(scene.objects)
        pair = pick(rng, HELD_OUT_PAIRS) if number == special else sample_pair(rng, [o.pair for o in scene.objects])
        size = pick(rng, SIZES) if count < 5 else ("large" if rng.random() < 0.2 else "small")
        if again and number and number != special and rng.random() < 0.75:
            pair, size = scene.objects[0].pair, scene.objects[0].size
        if sum((o.pair, o.size) == (pair, size) for o in scene.objects) == (MOST_OBJECTS if again else 2):
            continue
        item = _place(pair, size, scene.aspect, lined, rng)
        if item is None or not contrasts(item, scene, ground):
            continue
        if not crowded and any(touching(scene.aspect, item, other) for other in scene.objects):
            continue
        larger = Scene((*scene.objects, item), scene.background, scene.aspect, scene.finish)
        if crowded and not is_legible(larger):
            continue
        scene = larger
        if number + 1 == count:
            return scene
    return None


def _place(pair: Pair, size: str, aspect: float, lined: bool, rng: np.random.Generator) -> SceneObject | None:
    """An object somewhere in the picture; None if it is too large for it."""
    color, shape = pair
    low, high = WIDE_RADII[size]
    drawn = rng.random()
    radius = round(low + (high - low) * (math.sqrt(drawn) if size == "small" else drawn), 4)  # few of the smallest
    reach = REACH * radius  # in lengths of the longer side
    across, down = reach * max(1.0, 1.0 / aspect), reach * max(1.0, aspect)
    if max(across, down) > 0.5:
        return None
    x, y = (round(float(rng.uniform(half, 1.0 - half)), 4) for half in (across, down))
    most = _TURNS.get(shape, 0.0)
    if shape in ("triangle", "star") and rng.random() < 0.6:
        most = math.radians(15)
    angle = round(float(rng.uniform(-most, most)), 4)
    form = None if rng.random() < 0.3 else round(float(rng.random()), 3)
    rgb = wide_rgb(color, rng)
    line = (
        min(round(float(rng.uniform(0.06, 0.2)), 3), 0.7 * thickness(shape, form)) if lined and radius > 0.05 else 0.0
    )
    line_rgb = _line_rgb(rgb, rng) if line else (0, 0, 0)
    return SceneObject(color, shape, size, x, y, radius, angle, rgb, form, line, line_rgb)


def wide_rgb(color: str, rng: np.random.Generator) -> Rgb:
    """Returns any shade that goes by the name of a color, the pure ones included."""
    (low, high), saturations, values = _HUES[color]
    hue, saturation, value = (float(rng.uniform(*ends)) for ends in ((low, high), saturations, values))
    red, green, blue = (round(255 * channel) for channel in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))
    return red, green, blue


def _line_rgb(fill: Rgb, rng: np.random.Generator) -> Rgb:
    """Black, a dark gray, white or a darker shade of the fill."""
    form = rng.random()
    if form < 0.45:
        return 0, 0, 0
    if form < 0.6:
        return 255, 255, 255
    if form < 0.75:
        tone = int(rng.integers(20, 90))
        return tone, tone, tone
    shade = float(rng.uniform(0.35, 0.65))
    red, green, blue = (round(channel * shade) for channel in fill)
    return red, green, blue


def _sample_page(rng: np.random.Generator, photographs: tuple[str, ...]) -> Background:
    kinds = [kind for kind in PAGES if kind != "photo" or photographs]
    shares = np.array([PAGES[kind] for kind in kinds])
    kind = str(rng.choice(kinds, p=shares / shares.sum()))
    first, second = _page_rgb(rng), _page_rgb(rng)
    if kind == "plain":
        second = first
    if kind == "paper":
        first = _pale(rng, 225)
        second = int(rng.integers(120, 215)), int(rng.integers(150, 220)), int(rng.integers(170, 235))
    angle = round(float(rng.uniform(0.0, 2.0 * math.pi)), 3)
    return Background(
        kind, first, second, angle, int(rng.integers(2**31)), pick(rng, photographs) if kind == "photo" else ""
    )


def _page_rgb(rng: np.random.Generator) -> Rgb:
    """White, black, pale, muted or any color."""
    form = rng.random()
    if form < 0.28:
        return 255, 255, 255
    if form < 0.38:
        tone = int(rng.integers(0, 20))
        return tone, tone, tone
    if form < 0.6:
        return _pale(rng, 195)
    if form < 0.75:
        tone = int(rng.integers(20, 225))
        red, green, blue = (min(255, max(0, tone + int(rng.integers(-16, 17)))) for _ in range(3))
        return red, green, blue
    red, green, blue = (int(channel) for channel in rng.integers(0, 256, 3))
    return red, green, blue


def _pale(rng: np.random.Generator, least: int) -> Rgb:
    red, green, blue = (int(channel) for channel in rng.integers(least, 256, 3))
    return red, green, blue


def _sample_finish(rng: np.random.Generator) -> Finish:
    raster = str(rng.choice(("distance", "polygons", "hard"), p=(0.5, 0.25, 0.25)))
    low, high = (math.log(side) for side in _SIDES)
    red, green, blue = (round(float(g), 3) for g in rng.uniform(0.94, 1.06, 3) * rng.uniform(0.88, 1.05))
    shifted = rng.random() < 0.4
    return Finish(
        side=round(math.exp(rng.uniform(low, high))),
        soft=round(float(rng.uniform(1.5, 4.0)), 2) if rng.random() < 0.25 else 1.0,
        raster=raster,
        gain=(red, green, blue) if shifted else (1.0, 1.0, 1.0),
        gamma=round(float(rng.uniform(0.88, 1.15)), 3) if shifted else 1.0,
        noise=round(float(rng.uniform(1.0, 6.0)), 2) if rng.random() < 0.2 else 0.0,
        jpeg=int(rng.integers(35, 96)) if rng.random() < 0.35 else 0,
    )
