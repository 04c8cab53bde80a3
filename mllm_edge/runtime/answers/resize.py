"""Mask logits to masks of the picture as it was given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.runtime.preprocess import longest_side

STRIP = 1 << 20  # pixels of a mask whose logits are held at once


def at_full_size(logits: Floats, frame: int, size: tuple[int, int]) -> tuple[NDArray[np.bool_], float]:
    """One mask in the picture's own pixels (segment_anything `postprocess_masks`), and how sure it is.

    The logits at full size, four bytes a pixel and more while they are made, exist in strips alone.

    Args:
        logits: [h,w], the whole of the mask encoder's square.
        frame: pixels along a side of that square.
        size: width and height of the picture, whose longest side filled the square.

    Returns:
        bool [height,width], where the logits are above 0; the mean probability of its pixels, 0 of an empty one.
    """
    width, height = longest_side(*size, frame)
    square = resized(resized(logits, 0, frame), 1, frame)[:height, :width]
    lines = resized(square, 0, size[1])  # [height, width in the frame]
    mask = np.empty((size[1], size[0]), np.bool_)
    total, rows = 0.0, max(1, STRIP // size[0])
    for top in range(0, size[1], rows):
        strip = resized(lines[top : top + rows], 1, size[0])
        inside = np.greater(strip, 0, out=mask[top : top + rows])
        total += float(np.sum(1 / (1 + np.exp(-strip[inside])), dtype=np.float64))
    return mask, total / max(1, int(np.count_nonzero(mask)))


def resized(values: Floats, axis: int, length: int) -> Floats:
    """Bilinear along one axis, neither aligned at the corners nor smoothed (torch's `interpolate`)."""
    old = values.shape[axis]
    if old == length:
        return values
    places = np.clip((np.arange(length) + 0.5) * (old / length) - 0.5, 0, None)
    low = np.minimum(places.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    share = (places - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    below, above = np.take(values, low, axis), np.take(values, high, axis)
    result: Floats = below + (above - below) * share
    return result


def box_of(mask: NDArray[np.bool_]) -> list[int] | None:
    """x1,y1,x2,y2 of a mask's extent, the last two exclusive; None of an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union; 1 of two empty masks."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0
