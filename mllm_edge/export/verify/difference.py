"""Comparing arrays, and the rows of parity that come of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mllm_edge.bundle.manifest import Parity
from mllm_edge.errors import MllmEdgeError


def compare(measured: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Cosine, largest difference, and that over the largest value of `expected`, of two arrays of one shape."""
    if measured.shape != expected.shape:
        raise MllmEdgeError(
            f"the bundle gives shape {measured.shape} where PyTorch gives {expected.shape}; export it again"
        )
    a, b = measured.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    lengths, largest = float(np.linalg.norm(a) * np.linalg.norm(b)), float(np.abs(b).max())
    max_abs = float(np.abs(a - b).max())
    return {
        "cosine": float(a @ b) / lengths if lengths else float(max_abs == 0),
        "max_abs": max_abs,
        "relative_max": max_abs / largest if largest else max_abs,
    }


AT_LEAST = ("cosine", "top1", "agreement", "same_tokens", "mask_iou", "same_files")  # the others are at most


def parity(name: str, measured: dict[str, float], tolerance: dict[str, float]) -> Parity:
    """A row; not-a-number never passes."""
    passed = all(measured[k] >= limit if k in AT_LEAST else measured[k] <= limit for k, limit in tolerance.items())
    return Parity(name, passed, measured, tolerance)


def worst(measurements: Sequence[dict[str, float]]) -> dict[str, float]:
    """Per measure the worst value (np keeps not-a-number)."""
    pick = {key: np.min if key in AT_LEAST else np.max for key in measurements[0]}
    return {key: float(pick_one([measured[key] for measured in measurements])) for key, pick_one in pick.items()}
