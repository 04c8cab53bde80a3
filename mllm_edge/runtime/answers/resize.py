"""Mask logits to masks of the picture as it was given."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mllm_edge.runtime.engines.interface import Floats
from mllm_edge.runtime.preprocess import longest_side


def at_full_size(logits: Floats, frame: int, size: tuple[int, int]) -> Floats:
    """Logits of one mask in the picture's own pixels (segment_anything `postprocess_masks`).

    Args:
        logits: [h,w], the whole of the mask encoder's square.
        frame: pixels along a side of that square.
        size: width and height of the picture, whose longest side filled the square.

    Returns:
        float32 [height,width].
    """
    width, height = longest_side(*size, frame)
    square = resized(resized(logits, 0, frame), 1, frame)[:height, :width]
    return resized(resized(square, 0, size[1]), 1, size[0])


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


def confidence(logits: Floats) -> float:
    """Mean probability of the mask's pixels (logits > 0); 0 of an empty one."""
    inside = logits[logits > 0]
    return float(np.mean(1 / (1 + np.exp(-inside)))) if inside.size else 0.0


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union; 1 of two empty masks."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0
