"""Drawn scenes as the small diffusion model sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mllm_edge.scenes import Scene, render, sample_scene

MOST = 3  # objects of a picture


def small_scene(split: str, index: int, seed: int, objects: int = 0) -> Scene:
    """A scene with its first objects, their number drawn from 1 to 3; with at most `objects`, where that is not 0."""
    scene = sample_scene(split, index, seed)
    many = objects or 1 + int(np.random.default_rng([seed, 61, index]).integers(MOST))
    return replace(scene, objects=scene.objects[:many])


def small_pixels(scene: Scene, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scene's picture as the autoencoder takes it: float32 [3,side,side] in -1..1."""
    return (render(scene, side).transpose(2, 0, 1) / np.float32(127.5) - 1).astype(np.float32)
