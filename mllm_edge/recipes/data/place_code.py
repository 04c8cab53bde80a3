"""Places as vectors beside word embeddings: how the small T5 is told in training where in a picture a thing is.

Each side of a box is a bump on a line of `KNOTS`, a tenth of the picture apart, and where between two of them it is, as
an angle: so near places have near codes, and the first two digits of a coordinate are linear functions of its code. A
fixed rotation spreads the four sides over the T5's width.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
KNOTS = 11  # along a side of the picture
SCALE = 6.0  # of a bump, and of the angle's sine and cosine: a row's words, three or four, must not drown its place


def place_codes(boxes: np.ndarray[Any, Any], width: int) -> Floats:
    """Codes float32 [n,width] of boxes [n,4] in shares of the picture's sides."""
    tenths = np.asarray(boxes, float)[..., None] * (KNOTS - 1)  # [n,4,1]
    bumps = np.exp(-0.5 * (tenths - np.arange(KNOTS)) ** 2)  # [n,4,K]
    angles = 2 * np.pi * tenths
    features = np.concatenate([bumps, np.sin(angles), np.cos(angles)], axis=-1).reshape(len(tenths), -1)  # [n,4(K+2)]
    codes: Floats = (SCALE * features @ _rotation(features.shape[1], width)).astype(np.float32)
    return codes


@functools.cache
def _rotation(features: int, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Orthonormal rows [features,width], always the same."""
    square = np.random.default_rng(0).standard_normal((width, width))
    turned: np.ndarray[Any, np.dtype[np.float64]] = np.linalg.qr(square)[0][:features]
    return turned
