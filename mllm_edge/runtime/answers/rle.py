"""Masks as COCO's compressed run lengths, which pycocotools reads."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def encode(mask: NDArray[np.bool_]) -> dict[str, object]:
    """`{"size": [height, width], "counts": text}` of a mask bool [H,W].

    Runs go down the columns and begin with zeros. A count is written in groups of 5 bits, low ones first, each plus
    32 where another follows, as the character 48 places up; from the fourth count on the difference to the one two
    before is written (cocoapi common/maskApi.c `rleToString`).
    """
    flat = mask.ravel(order="F")
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate([[0], borders, [flat.size]])).tolist()
    if flat.size and flat[0]:
        counts.insert(0, 0)
    text = []
    for number, count in enumerate(counts):
        value = count - counts[number - 2] if number > 2 else count
        while True:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text.append(chr(group + (32 if more else 0) + 48))
            if not more:
                break
    return {"size": list(mask.shape), "counts": "".join(text)}
