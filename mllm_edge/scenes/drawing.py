"""Pictures, masks and boxes of scenes, at any pixel size.

Shapes are signed distance functions (see `shapes`) evaluated at pixel centers in the object's own bounding box: edges
are smooth without drawing at a larger size first. Wide scenes are also drawn as polygons by Pillow; their masks are the
same.
"""

import io
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from mllm_edge.scenes.model import Finish, Scene, SceneObject
from mllm_edge.scenes.pages import page
from mllm_edge.scenes.shapes import REACH, Floats, coverage, distance

_SMOOTH = 4  # Pillow's polygons are drawn at this many times the size
_SIDE = 128  # pixels, unless said otherwise


def render(scene: Scene, size: int = _SIDE) -> npt.NDArray[np.uint8]:
    """Draws a scene.

    Args:
        scene: What to draw.
        size: The longer side of the picture in pixels; other scenes than wide ones are square.

    Returns:
        uint8 [height, width, 3], RGB.

    Raises:
        ValueError: `size` is not positive, or the scene needs a photograph that is not installed.
    """
    width, height = scene.extent(_checked(size))
    canvas = page(scene.background, width, height)
    for item in scene.objects:
        window, away = _pixel_distance(item, width, height)
        covered = _covered(item, scene.finish, window, away, (width, height))
        canvas[window] += covered[..., None] * (np.array(item.rgb, np.float32) - canvas[window])
        if item.line:
            width_px = item.line * item.radius * max(width, height)
            lined = np.minimum(covered, np.clip(0.5 + away + width_px, 0.0, 1.0).astype(np.float32))
            canvas[window] += lined[..., None] * (np.array(item.line_rgb, np.float32) - canvas[window])
    if scene.finish is None:
        return (canvas + 0.5).astype(np.uint8)
    return _finished(canvas, scene.finish, scene.background.seed)


def _covered(
    item: SceneObject, finish: Finish | None, window: tuple[slice, slice], away: Floats, extent: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """The share of each of the window's pixels that the object covers."""
    if finish is None or finish.raster == "distance":
        soft = 1.0 if finish is None else finish.soft
        return np.clip(0.5 - away / soft, 0.0, 1.0).astype(np.float32)
    left, top = item.x * extent[0] - window[1].start, item.y * extent[1] - window[0].start
    radius, fine = item.radius * max(extent), _SMOOTH if finish.raster == "polygons" else 1
    drawn = coverage(item.shape, item.form, radius, item.angle, (left, top), max(away.shape), fine)
    return drawn[: away.shape[0], : away.shape[1]].astype(np.float32)


def _finished(canvas: npt.NDArray[np.float32], finish: Finish, seed: int) -> npt.NDArray[np.uint8]:
    light = canvas
    if finish.gamma != 1.0 or finish.gain != (1.0, 1.0, 1.0):
        light = np.clip(canvas / 255, 0.0, 1.0) ** np.float32(finish.gamma) * np.array(finish.gain, np.float32) * 255
    if finish.noise:
        light = light + np.random.default_rng([seed, 2]).normal(0.0, finish.noise, light.shape).astype(np.float32)
    picture: npt.NDArray[np.uint8] = (np.clip(light, 0.0, 255.0) + 0.5).astype(np.uint8)
    if finish.jpeg:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, "JPEG", quality=finish.jpeg)
        picture = np.asarray(Image.open(stream))
    return picture


def masks(scene: Scene, size: int = _SIDE) -> npt.NDArray[np.bool_]:
    """Returns the visible pixels of each object.

    A pixel belongs to the topmost object that covers its center.

    Args:
        scene: The scene.
        size: The longer side of the picture in pixels.

    Returns:
        bool [objects, height, width], in the order of `scene.objects`; no pixel is True twice.

    Raises:
        ValueError: `size` is not positive.
    """
    width, height = scene.extent(_checked(size))
    owner = np.full((height, width), -1, np.int8)
    for index, item in enumerate(scene.objects):
        window, away = _pixel_distance(item, width, height)
        owner[window][away <= 0.0] = index
    visible: npt.NDArray[np.bool_] = owner == np.arange(len(scene.objects), dtype=np.int8)[:, None, None]
    return visible


def boxes(scene: Scene, size: int = _SIDE) -> npt.NDArray[np.int64]:
    """Returns the extents of the visible pixels of each object.

    Args:
        scene: The scene.
        size: The longer side of the picture in pixels.

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
    whole = [int((_pixel_distance(item, *scene.extent(size))[1] <= 0.0).sum()) for item in scene.objects]
    return [float(seen) / max(area, 1) for seen, area in zip(visible, whole, strict=True)]


def footprint(
    item: SceneObject, extent: tuple[int, int], margin: float = 0.0
) -> tuple[tuple[slice, slice], npt.NDArray[np.bool_]]:
    """Returns the object's window into a picture of (width, height) pixels, and which of the window's pixels it covers
    or has at most `margin` pixels away, whatever lies on top of it."""
    window, away = _pixel_distance(item, *extent)
    return window, away <= margin


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"a picture cannot be {size} pixels wide; give a size of 1 or more")
    return size


def _pixel_distance(item: SceneObject, width: int, height: int) -> tuple[tuple[slice, slice], Floats]:
    """Returns the object's window into the picture and each pixel's signed distance, in pixels."""
    longer = max(width, height)
    reach = REACH * item.radius + 1.0 / longer  # in lengths of the longer side
    (top, bottom), (left, right) = (
        (
            max(0, math.floor((center - reach * (longer / side)) * side)),
            max(0, min(side, math.ceil((center + reach * (longer / side)) * side))),
        )
        for center, side in ((item.y, height), (item.x, width))
    )
    x = ((np.arange(left, right) + 0.5) / width - item.x) * (width / longer) / item.radius
    y = ((np.arange(top, bottom) + 0.5) / height - item.y)[:, None] * (height / longer) / item.radius
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    away = distance(item.shape, item.form, cos * x + sin * y, cos * y - sin * x) * (item.radius * longer)
    return (slice(top, bottom), slice(left, right)), away
