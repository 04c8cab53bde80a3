"""COCO's segmentations as masks: polygons, run lengths, and their compressed form."""

import reprlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mllm_edge.recipes.data.fields import field, number, refusal

Segmentation = list[list[float]] | dict[str, Any]

_MOST_PIXELS = 2**28  # of a mask, one bool each; more than any photograph has
_MOST_GROUPS = 7  # 5 bits each: enough for 2**31 pixels and a sign


def decode_segmentation(segmentation: Segmentation, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Turns a COCO segmentation into a mask.

    Args:
        segmentation: Polygons ([[x1, y1, x2, y2, ...], ...] in pixels, their union counts) or run
            lengths ({"size": [height, width], "counts": list of int or COCO's compressed string}).
        height: Rows of the picture.
        width: Columns of the picture.

    Returns:
        bool [height, width]. A pixel is in a polygon when its center is (by the even-odd rule).

    Raises:
        BadInput: The segmentation is malformed or does not have the picture's size.
    """
    where = "segmentation"
    if min(height, width) < 1 or height * width > _MOST_PIXELS:
        raise refusal(where, f"a mask of {height} x {width} pixels is not possible", "check the picture's size")
    check_segmentation(segmentation, height, width, where)
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return _fill_runs(_decompress(counts) if isinstance(counts, str) else counts, height, width)
    mask = np.zeros((height, width), np.bool_)
    for polygon in segmentation:
        corners = np.array([number(value, where, "a polygon coordinate") for value in polygon]).reshape(-1, 2)
        mask |= _fill_polygon(corners, height, width)
    return mask


def check_segmentation(raw: object, height: int | None, width: int | None, where: str) -> None:
    """Checks the structure but not the many numbers, which are checked only when a mask is decoded."""
    if isinstance(raw, dict):
        size, counts = field(list, raw, "size", where), raw.get("counts")
        if not isinstance(counts, (str, list)):
            raise refusal(where, 'its run lengths have no "counts"', "give a list or COCO's compressed text")
        if height is not None and size != [height, width]:
            wrong = f"its run lengths are of size {reprlib.repr(size)}, not [{height}, {width}]"
            raise refusal(where, wrong, "use the size of the picture it was drawn on")
    elif not isinstance(raw, list) or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in raw):
        remedy = "give lists [x1, y1, x2, y2, x3, y3, ...] or run lengths with size and counts"
        raise refusal(where, "it is neither polygons nor run lengths", remedy)


def _fill_polygon(corners: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Marks pixels by the even-odd rule: left of them, the row of pixel centers crosses an odd number of edges."""
    crossings = np.zeros((height, width + 1), np.int32)
    rows = np.arange(height) + 0.5
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        hit = np.flatnonzero((rows >= min(y1, y2)) & (rows < max(y1, y2)))
        x = x1 + (rows[hit] - y1) * ((x2 - x1) / (y2 - y1)) if hit.size else rows[hit]
        crossings[hit, np.ceil(np.clip(x - 0.5, 0, width)).astype(np.int64)] += 1
    inside: npt.NDArray[np.bool_] = np.cumsum(crossings[:, :width], axis=1) % 2 == 1
    return inside


def _fill_runs(counts: list[Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Expands runs of 0, 1, 0, 1, ... in column-major order, as COCO does."""
    if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != height * width:
        wrong = f"its counts are not whole numbers of 0 or more with the sum {height * width}"
        raise refusal("segmentation", wrong, "encode the mask again")
    values = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(width, height).T)


def _decompress(text: str) -> list[int]:
    """Decodes COCO's compressed counts: 5 bits a character, low bits first, differences from the fourth count on."""
    counts: list[int] = []
    value = groups = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or groups == _MOST_GROUPS:
            raise refusal("segmentation", "its compressed counts are damaged", "encode the mask again")
        value |= (bits & 31) << (5 * groups)
        groups += 1
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << (5 * groups)
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = groups = 0
    if groups:
        raise refusal("segmentation", "its compressed counts end too early", "encode the mask again")
    return counts
