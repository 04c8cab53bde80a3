"""How far two arrays are apart, without PyTorch: boards compare, too."""

from __future__ import annotations

import numpy as np

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
