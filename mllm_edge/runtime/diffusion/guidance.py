"""Classifier-free guidance over any number of conditions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mllm_edge.runtime.engines.interface import Floats


def guided(branches: Sequence[Floats], scales: Sequence[float]) -> Floats:
    """One prediction out of those with ever fewer conditions.

    `branches[k]` has the first k conditions dropped: e = e_last + sum over i of s_i (e_i - e_(i+1)). One scale is Ho &
    Salimans 2022; two, over text and picture, InstructPix2Pix (Brooks et al. 2023, equation 3).
    """
    result = branches[-1].astype(np.float32)
    for scale, (fuller, emptier) in zip(scales, pairwise(branches), strict=True):
        result = result + np.float32(scale) * (fuller - emptier)
    return result
