"""Scenes as encoder inputs for training."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.llava.plan import preprocessing
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import render
from mllm_edge.scenes.model import COLOR_RGB, Scene

APART = 70.0  # least RGB distance of a repainted color from every named one


def pixels(scene: Scene, dims: LlavaDims) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scene's pixels for the vision encoder, by the runtime's own preprocessing: float32 [3,S,S]."""
    picture = Image.fromarray(render(scene, dims.vision.image_size))
    return preprocess(picture, preprocessing(dims))[0]


def repaint(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with every object in a color far from all named ones.

    Shapes learned only in named colors become tied to them: a shape is then not recognized in a color it was never seen
    in. No named (color, shape) pair results from this, so the held-out pairs stay held out.
    """
    return replace(scene, objects=tuple(replace(thing, rgb=_unnamed_color(rng)) for thing in scene.objects))


def _unnamed_color(rng: np.random.Generator) -> tuple[int, int, int]:
    named = np.array(list(COLOR_RGB.values()), float)
    while True:
        hue, saturation, value = rng.uniform((0, 0, 0.6), (1, 1, 1))
        color = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        if np.linalg.norm(named - color, axis=1).min() >= APART:
            red, green, blue = (int(channel) for channel in color)
            return red, green, blue
