"""Pictures, masks and boxes of scenes, at any pixel size.

Shapes are signed distance functions (negative inside, 1.0 = one radius) evaluated at pixel centers
in the object's own bounding box: edges are smooth without drawing at a larger size first.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image

from mllm_edge.scenes.model import Background, Scene, SceneObject

Floats = npt.NDArray[np.float64]

REACH = 1.25  # upper bound of a shape's extent from its center, in radii

_SQUARE_HALF_SIDE = 0.88
_TRIANGLE_INRADIUS = 0.6
_STAR_TIP, _STAR_NOTCH = 1.25, 0.58
_CROSS_LENGTH, _CROSS_WIDTH = 1.1, 0.38
_RING_MIDDLE, _RING_HALF_WIDTH = 0.78, 0.22

_NOISE_GRIDS = (4, 8, 16, 32, 64)  # octaves of a texture, coarse to fine


def _circle(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1.0


def _square(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - _SQUARE_HALF_SIDE


def _triangle(u: Floats, v: Floats) -> Floats:
    return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - _TRIANGLE_INRADIUS


def _star(u: Floats, v: Floats) -> Floats:
    # Fold the plane into half of one of the star's five points, which leaves the distance to one line.
    half = math.pi / 5
    turn = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    reach = np.hypot(u, v)
    edge_x, edge_y = _STAR_NOTCH * math.cos(half) - _STAR_TIP, _STAR_NOTCH * math.sin(half)
    along, across = reach * np.cos(turn) - _STAR_TIP, reach * np.sin(turn)
    distance: Floats = (along * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)
    return distance


def _cross(u: Floats, v: Floats) -> Floats:
    across, along = np.abs(u), np.abs(v)
    upright = np.maximum(across - _CROSS_WIDTH, along - _CROSS_LENGTH)
    level = np.maximum(along - _CROSS_WIDTH, across - _CROSS_LENGTH)
    return np.minimum(upright, level)


def _ring(u: Floats, v: Floats) -> Floats:
    return np.abs(np.hypot(u, v) - _RING_MIDDLE) - _RING_HALF_WIDTH


_DISTANCE: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def render(scene: Scene, size: int = 128) -> npt.NDArray[np.uint8]:
    """Draws a scene.

    Args:
        scene: What to draw.
        size: Width and height of the picture in pixels.

    Returns:
        uint8 [size, size, 3], RGB.

    Raises:
        ValueError: `size` is not positive.
    """
    canvas = _draw_background(scene.background, _checked(size))
    for item in scene.objects:
        window, distance = _pixel_distance(item, size)
        coverage = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)[..., None]
        canvas[window] += coverage * (np.array(item.rgb, np.float32) - canvas[window])
    return (canvas + 0.5).astype(np.uint8)


def masks(scene: Scene, size: int = 128) -> npt.NDArray[np.bool_]:
    """Returns the visible pixels of each object.

    A pixel belongs to the topmost object that covers its center.

    Args:
        scene: The scene.
        size: Width and height of the picture in pixels.

    Returns:
        bool [objects, size, size], in the order of `scene.objects`; no pixel is True twice.

    Raises:
        ValueError: `size` is not positive.
    """
    owner = np.full((_checked(size), size), -1, np.int8)
    for index, item in enumerate(scene.objects):
        window, distance = _pixel_distance(item, size)
        owner[window][distance <= 0.0] = index
    visible: npt.NDArray[np.bool_] = owner == np.arange(len(scene.objects), dtype=np.int8)[:, None, None]
    return visible


def boxes(scene: Scene, size: int = 128) -> npt.NDArray[np.int64]:
    """Returns the extents of the visible pixels of each object.

    Args:
        scene: The scene.
        size: Width and height of the picture in pixels.

    Returns:
        int64 [objects, 4]: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; zeros for an object without
        visible pixels.

    Raises:
        ValueError: `size` is not positive.
    """
    found = np.zeros((len(scene.objects), 4), np.int64)
    for row, mask in zip(found, masks(scene, size), strict=True):
        columns, lines = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if columns.size:
            row[:] = columns[0], lines[0], columns[-1] + 1, lines[-1] + 1
    return found


def visible_fractions(scene: Scene, size: int) -> list[float]:
    """Returns, for each object, the part of its pixels (0..1) that no later object covers."""
    visible = masks(scene, size).sum(axis=(1, 2))
    whole = [int((_pixel_distance(item, size)[1] <= 0.0).sum()) for item in scene.objects]
    return [float(seen) / max(area, 1) for seen, area in zip(visible, whole, strict=True)]


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"a picture cannot be {size} pixels wide; give a size of 1 or more")
    return size


def _pixel_distance(item: SceneObject, size: int) -> tuple[tuple[slice, slice], Floats]:
    """Returns the object's window into the picture and each pixel's signed distance, in pixels."""
    reach = REACH * item.radius + 1.0 / size
    (top, bottom), (left, right) = (
        (max(0, math.floor((center - reach) * size)), max(0, min(size, math.ceil((center + reach) * size))))
        for center in (item.y, item.x)
    )
    x = ((np.arange(left, right) + 0.5) / size - item.x) / item.radius
    y = ((np.arange(top, bottom) + 0.5) / size - item.y)[:, None] / item.radius
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    distance = _DISTANCE[item.shape](cos * x + sin * y, cos * y - sin * x) * (item.radius * size)
    return (slice(top, bottom), slice(left, right)), distance


def _draw_background(background: Background, size: int) -> npt.NDArray[np.float32]:
    first = np.array(background.first, np.float32)
    second = np.array(background.second, np.float32)
    if background.kind == "plain":
        return np.tile(first, (size, size, 1))
    if background.kind == "gradient":
        return first + _ramp(background.angle, size)[..., None] * (second - first)
    noise = _noise(background.seed, size)
    # The second field varies the brightness without changing the hue, like uneven light.
    return first + noise[..., :1] * (second - first) + 16.0 * (noise[..., 1:] - 0.5)


def _ramp(angle: float, size: int) -> npt.NDArray[np.float32]:
    """Returns float32 [size, size], 0 to 1 across the picture in the direction of the angle."""
    middle = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    cos, sin = math.cos(angle), math.sin(angle)
    ramp = (middle * cos + middle[:, None] * sin) / (abs(cos) + abs(sin)) + 0.5
    return ramp.astype(np.float32)


def _noise(seed: int, size: int) -> npt.NDArray[np.float32]:
    """Returns float32 [size, size, 2]: two fields in 0..1, the sum of octaves of random grids."""
    rng = np.random.default_rng(seed)
    fields = []
    for _ in range(2):
        field = Image.new("F", (1, 1), 0.5)
        for octave, grid in enumerate(_NOISE_GRIDS):
            ripple = (rng.random((grid, grid), np.float32) - 0.5) * 0.62**octave
            smooth = np.asarray(field.resize((grid, grid), Image.Resampling.BICUBIC))
            field = Image.fromarray(smooth + ripple)
        fields.append(np.asarray(field.resize((size, size), Image.Resampling.BICUBIC)))
    return np.stack(fields, axis=-1).clip(0.0, 1.0)
