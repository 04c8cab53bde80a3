"""Places as vectors beside word embeddings: how the small T5 is told in training where in a picture a thing is.

Each side of a box is a bump on a line of `KNOTS`, so that near places have near codes and the digits of a coordinate
can be read off; a fixed rotation spreads the four lines over the T5's width.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
KNOTS = 21  # along a side of the picture
LENGTH = 2.0  # of a code; a word embedding has about 1


def place_codes(boxes: np.ndarray[Any, Any], width: int) -> Floats:
    """Codes float32 [n,width] of boxes [n,4] in shares of the picture's sides."""
    away = np.asarray(boxes)[..., None] * (KNOTS - 1) - np.arange(KNOTS)  # [n,4,K], in knots
    bumps = np.exp(-0.5 * away**2).reshape(len(boxes), -1)  # [n,4K]
    bumps *= LENGTH / np.linalg.norm(bumps, axis=1, keepdims=True)
    codes: Floats = (bumps @ _rotation(bumps.shape[1], width)).astype(np.float32)
    return codes


@functools.cache
def _rotation(features: int, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Orthonormal rows [features,width], always the same."""
    square = np.random.default_rng(0).standard_normal((width, width))
    turned: np.ndarray[Any, np.dtype[np.float64]] = np.linalg.qr(square)[0][:features]
    return turned
