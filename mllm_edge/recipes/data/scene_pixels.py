"""Scenes as encoder inputs for training: drawn, and seen as an encoder that pads pictures to a square sees them."""

from __future__ import annotations

import colorsys
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.llava.plan import preprocessing
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import boxes, masks, render, stands_out
from mllm_edge.scenes.model import COLOR_RGB, Scene

REPAINTS = 20  # attempts to find colors that a wide scene's page does not hide
APART = 70.0  # least RGB distance of a repainted color from every named one
BOXED = 300  # longer side of the picture that boxes are measured on
COVERED = 0.08  # share of a patch that an object must cover to own it


def pixels(scene: Scene, dims: LlavaDims) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scene's pixels for the vision encoder, by the runtime's own preprocessing: float32 [3,S,S]."""
    return preprocess(drawn(scene, dims.vision.image_size), preprocessing(dims))[0]


def drawn(scene: Scene, size: int) -> Image.Image:
    """The scene's picture: a wide one at its own size, others at `size` pixels."""
    return Image.fromarray(render(scene, scene.finish.side if scene.finish else size))


def square_masks(scene: Scene, size: int, centered: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`masks` on the square that the picture is padded to, around it or at the right and below: bool
    [objects,size,size]."""
    visible = masks(scene, size)  # [n,H,W]
    square = np.zeros((len(visible), size, size), np.bool_)
    top, left = ((size - side) // 2 if centered else 0 for side in visible.shape[1:])
    square[:, top : top + visible.shape[1], left : left + visible.shape[2]] = visible
    return square


def squashed_masks(scene: Scene, size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`masks` on the square that the picture is squashed into: bool [objects,size,size]."""
    return np.stack([np.asarray(Image.fromarray(one).resize((size, size))) for one in masks(scene, size)])


def raster(places: np.ndarray[Any, Any], lines: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Cells, row-major, of a `lines` x `lines` raster that places [n,2] in 0..1 lie in: int64 [n]."""
    columns, rows = np.clip((places * lines).astype(int), 0, lines - 1).T
    return rows * lines + columns


def owners(
    covered: np.ndarray[Any, np.dtype[np.bool_]], centers: np.ndarray[Any, Any], grid: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The object of each patch of a `grid` x `grid` raster, int64 [N], -1 where there is none.

    Args:
        covered: the objects' masks on the square, bool [n,S,S].
        centers: their centers on it, [n,2] in 0..1.
        grid: patches along a side.
    """
    patch = covered.shape[1] // grid
    share = covered.reshape(-1, grid, patch, grid, patch).mean(axis=(2, 4)).reshape(len(covered), -1)  # [n,N]
    owner = np.where(share.max(axis=0) >= COVERED, share.argmax(axis=0), -1)  # [N]
    # The hole of a ring counts as the ring, so that a center patch always has an object.
    middles = raster(centers, grid)
    owner[middles] = np.where(owner[middles] >= 0, owner[middles], np.arange(len(covered)))
    return owner


def box_shares(scene: Scene) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The objects' boxes in shares of the picture's sides: float64 [objects,4]."""
    shares: np.ndarray[Any, np.dtype[np.float64]] = boxes(scene, BOXED) / np.tile(scene.extent(BOXED), 2)
    return shares


def padded_centers(scene: Scene) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The objects' centers on that square: float64 [objects,2], x and y in 0..1."""
    shares = np.array([min(1.0, scene.aspect), min(1.0, 1.0 / scene.aspect)])
    return 0.5 + (np.array([(thing.x, thing.y) for thing in scene.objects]) - 0.5) * shares


def repaint(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with every object in a color far from all named ones; a page that few colors stand out from may leave
    it as it is.

    Shapes learned only in named colors become tied to them: a shape is then not recognized in a color it was never seen
    in. No named (color, shape) pair results from this, so the held-out pairs stay held out.
    """
    for _ in range(REPAINTS):
        changed = replace(scene, objects=tuple(replace(thing, rgb=_unnamed_color(rng)) for thing in scene.objects))
        if stands_out(changed):
            return changed
    return scene


def _unnamed_color(rng: np.random.Generator) -> tuple[int, int, int]:
    named = np.array(list(COLOR_RGB.values()), float)
    while True:
        hue, saturation, value = rng.uniform((0, 0, 0.6), (1, 1, 1))
        color = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        if np.linalg.norm(named - color, axis=1).min() >= APART:
            red, green, blue = (int(channel) for channel in color)
            return red, green, blue
