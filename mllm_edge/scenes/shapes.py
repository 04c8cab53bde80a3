"""The six shapes, as signed distances and as polygons.

A signed distance is negative inside; 1.0 is one radius. `form` (0..1) varies a shape's proportions: the width of a
cross and a ring, the depth of a star's notches, the lean of a triangle. None gives the proportions of the scenes that
the first models were trained on.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Floats = npt.NDArray[np.float64]
Points = list[tuple[float, float]]

REACH = 1.25  # upper bound of a shape's extent from its center, in radii

_SQUARE_HALF_SIDE = 0.88
_TRIANGLE_INRADIUS = 0.6
_STAR_TIP, _STAR_NOTCH, _STAR_NOTCHES = 1.25, 0.58, (0.42, 0.7)
_CROSS_LENGTH, _CROSS_WIDTH, _CROSS_WIDTHS = 1.1, 0.38, (0.22, 0.5)
_RING_MIDDLE, _RING_HALF_WIDTH, _RING_HALF_WIDTHS = 0.78, 0.22, (0.12, 0.3)
_LEANS = (-0.62, 0.62)  # of a triangle's tip, in radii; at the ends it is about right-angled
_TURNS = 64  # corners of a polygon that stands for a circle


def distance(shape: str, form: float | None, u: Floats, v: Floats) -> Floats:
    """Signed distance to a shape's edge in radii, at places `u` (to the right) and `v` (down) relative to its center.

    Of a leaning triangle only the edges' own lines are exact: outside a corner it is too small.
    """
    return _DISTANCE[shape](u, v, form)


def coverage(
    shape: str, form: float | None, radius: float, angle: float, center: tuple[float, float], size: int, fine: int
) -> Floats:
    """The share of each pixel that a shape covers, drawn as polygons by Pillow.

    Args:
        shape: One of the six shapes.
        form: See the module.
        radius: In pixels.
        angle: Clockwise rotation in radians.
        center: x and y in pixels from the raster's top left corner.
        size: Width and height of the raster in pixels.
        fine: Pillow draws at `fine` times the size and averages; 1 leaves hard edges.

    Returns:
        float64 [size, size] in 0..1.
    """
    canvas = Image.new("L", (size * fine, size * fine))
    pen = ImageDraw.Draw(canvas)
    cos, sin = math.cos(angle), math.sin(angle)
    for number, points in enumerate(_polygons(shape, form)):
        corners = [
            (
                (center[0] + radius * (cos * x - sin * y)) * fine,
                (center[1] + radius * (sin * x + cos * y)) * fine,
            )
            for x, y in points
        ]
        pen.polygon(corners, fill=0 if shape == "ring" and number else 255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float64) / 255


def thickness(shape: str, form: float | None) -> float:
    """Half the width of a shape's thinnest part, in radii: no line along its edge may be as wide."""
    if shape == "ring":
        return _between(_RING_HALF_WIDTHS, form, _RING_HALF_WIDTH)
    if shape == "cross":
        return _between(_CROSS_WIDTHS, form, _CROSS_WIDTH)
    return 0.5


def _between(ends: tuple[float, float], form: float | None, usual: float) -> float:
    return usual if form is None else ends[0] + form * (ends[1] - ends[0])


def _circle(u: Floats, v: Floats, _: float | None) -> Floats:
    return np.hypot(u, v) - 1.0


def _square(u: Floats, v: Floats, _: float | None) -> Floats:
    return np.maximum(np.abs(u), np.abs(v)) - _SQUARE_HALF_SIDE


def _triangle(u: Floats, v: Floats, form: float | None) -> Floats:
    if form is None:
        return np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - _TRIANGLE_INRADIUS
    corners = _leaning(form)
    sides = []
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        across, down = y2 - y1, x1 - x2  # the outward normal of a side, corners being clockwise on the screen
        sides.append(((u - x1) * across + (v - y1) * down) / math.hypot(across, down))
    return np.maximum(np.maximum(sides[0], sides[1]), sides[2])


def _leaning(form: float) -> Points:
    """A triangle whose tip leans left or right, with the reach of the upright one."""
    half, low, high = _TRIANGLE_INRADIUS * math.sqrt(3), _TRIANGLE_INRADIUS, -2 * _TRIANGLE_INRADIUS
    corners = [(_between(_LEANS, form, 0.0), high), (half, low), (-half, low)]
    middle = sum(x for x, _ in corners) / 3
    scale = 2 * _TRIANGLE_INRADIUS / max(math.hypot(x - middle, y) for x, y in corners)
    return [((x - middle) * scale, y * scale) for x, y in corners]


def _star(u: Floats, v: Floats, form: float | None) -> Floats:
    # Fold the plane into half of one of the star's five points, which leaves the distance to one line.
    half, notch = math.pi / 5, _between(_STAR_NOTCHES, form, _STAR_NOTCH)
    turn = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
    reach = np.hypot(u, v)
    edge_x, edge_y = notch * math.cos(half) - _STAR_TIP, notch * math.sin(half)
    along, across = reach * np.cos(turn) - _STAR_TIP, reach * np.sin(turn)
    found: Floats = (along * edge_y - across * edge_x) / math.hypot(edge_x, edge_y)
    return found


def _cross(u: Floats, v: Floats, form: float | None) -> Floats:
    across, along, width = np.abs(u), np.abs(v), _between(_CROSS_WIDTHS, form, _CROSS_WIDTH)
    upright = np.maximum(across - width, along - _CROSS_LENGTH)
    level = np.maximum(along - width, across - _CROSS_LENGTH)
    return np.minimum(upright, level)


def _ring(u: Floats, v: Floats, form: float | None) -> Floats:
    half = _between(_RING_HALF_WIDTHS, form, _RING_HALF_WIDTH)
    return np.abs(np.hypot(u, v) - (_RING_MIDDLE if form is None else 1.0 - half)) - half


_DISTANCE: dict[str, Callable[[Floats, Floats, float | None], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


def _polygons(shape: str, form: float | None) -> list[Points]:
    """A shape's outer edge and, of a ring, its hole; in radii from the center."""
    if shape == "circle":
        return [_round(1.0)]
    if shape == "ring":
        half = _between(_RING_HALF_WIDTHS, form, _RING_HALF_WIDTH)
        return [_round(1.0), _round(1.0 - 2 * half)]
    if shape == "square":
        side = _SQUARE_HALF_SIDE
        return [[(-side, -side), (side, -side), (side, side), (-side, side)]]
    if shape == "triangle":
        return [_leaning(0.5 if form is None else form)]
    if shape == "star":
        reaches = (_STAR_TIP, _between(_STAR_NOTCHES, form, _STAR_NOTCH)) * 5
        turns = [number * math.pi / 5 for number in range(10)]
        return [[(r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(reaches, turns, strict=True)]]
    long, wide = _CROSS_LENGTH, _between(_CROSS_WIDTHS, form, _CROSS_WIDTH)
    corner = [(wide, -long), (wide, -wide), (long, -wide)]  # a quarter, turned four times
    quarters = [corner, [(-y, x) for x, y in corner], [(-x, -y) for x, y in corner], [(y, -x) for x, y in corner]]
    return [[point for quarter in quarters for point in quarter]]


def _round(radius: float) -> Points:
    turns = [2 * math.pi * number / _TURNS for number in range(_TURNS)]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]
