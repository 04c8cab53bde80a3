"""Boxes from the user: checked against the picture, and normalized for the region encoder or as text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.interface import Floats

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels of the picture as given


def check_boxes(boxes: Sequence[Sequence[float]], size: tuple[int, int]) -> list[Box]:
    """The boxes, clipped to the picture of `size` (width, height), with a warning if that changes one.

    Raises:
        BadInput: not four finite numbers, no area, or entirely outside the picture.
    """
    width, height = size
    checked: list[Box] = []
    for box in boxes:
        if len(box) != 4 or not all(np.isfinite(value) for value in box):
            raise BadInput(f"box {tuple(box)} is not x1,y1,x2,y2; give four numbers of pixels")
        x1, y1, x2, y2 = (float(value) for value in box)
        named = f"box {x1:g},{y1:g},{x2:g},{y2:g}"
        if x1 >= x2 or y1 >= y2:
            raise BadInput(f"{named} has no area; give x1,y1,x2,y2 with x1 < x2 and y1 < y2")
        inside = max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            raise BadInput(
                f"{named} lies outside the picture of {width} x {height} pixels; give pixels of this picture"
            )
        if inside != (x1, y1, x2, y2):
            cut = ",".join(f"{value:g}" for value in inside)
            warnings.warn(f"{named} reaches beyond the picture and is cut to {cut}", RuntimeWarning, stacklevel=2)
        checked.append(inside)
    return checked


def spelled(box: Sequence[float], size: tuple[float, float], unit: float = 1.0, decimals: int = 3) -> str:
    """A box as text, "[x1,y1,x2,y2]" in units of `1 / unit` of the sides `size`: "[0.440,0.060,0.650,0.367]"."""
    return f"[{','.join(f'{value / side * unit:.{decimals}f}' for value, side in zip(box, (*size, *size)))}]"


def box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of boxes x1,y1,x2,y2; 0 where both have no area."""
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    whole = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - across * down
    return across * down / whole if whole > 0 else 0.0


def normalized(boxes: Sequence[Box], size: tuple[int, int]) -> Floats:
    """float32 [n,4] in 0..1 of the whole picture, even if the encoder crops it (Rasheed et al. 2024)."""
    return (np.array(boxes, np.float32).reshape(-1, 4) / np.array([*size, *size], np.float32)).astype(np.float32)
