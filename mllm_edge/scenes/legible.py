"""What a scene must keep so that it can be asked about: its objects are seen, and each stands out."""

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt

from mllm_edge.scenes.drawing import footprint, visible_fractions
from mllm_edge.scenes.model import Scene, SceneObject
from mllm_edge.scenes.pages import page
from mllm_edge.scenes.shapes import REACH

LEAST_VISIBLE = 0.6
CONTRAST = 64.0  # least distance in RGB of an object's color from the page around it

_CHECK_SIZE = 64  # pixels; visibility is always judged at this size, whatever the caller's
_PAGE_SIZE = 48  # pixels of the longer side at which the contrast is judged
_CLOSE = 0.1  # share of the pixels under and around an object that may be closer to its color than `CONTRAST`


def is_legible(scene: Scene) -> bool:
    """Returns whether every object shows 60 % of its pixels, none touches another of its color, and all stand out."""
    meetings = [(a, b) for a, b in combinations(scene.objects, 2) if touching(scene.aspect, a, b)]
    if any(a.color == b.color for a, b in meetings):
        return False
    if meetings and min(visible_fractions(scene, _CHECK_SIZE)) < LEAST_VISIBLE:
        return False
    return stands_out(scene)


def touching(aspect: float, a: SceneObject, b: SceneObject) -> bool:
    """Returns whether two objects may touch in a picture of that aspect."""
    across, down = (a.x - b.x) * min(1.0, aspect), (a.y - b.y) * min(1.0, 1.0 / aspect)
    return math.hypot(across, down) < REACH * (a.radius + b.radius)


def stands_out(scene: Scene) -> bool:
    """Returns whether each object's color differs from the page around it (muted pages hide none of our colors)."""
    if scene.finish is None:
        return True
    ground = coarse_page(scene)
    return all(contrasts(item, scene, ground) for item in scene.objects)


def coarse_page(scene: Scene) -> npt.NDArray[np.float32]:
    """Returns the scene's page alone, small, for `contrasts`."""
    return page(scene.background, *scene.extent(_PAGE_SIZE))


def contrasts(item: SceneObject, scene: Scene, ground: npt.NDArray[np.float32]) -> bool:
    """Returns whether an object's color differs from the page (`coarse_page`) under it and up to two pixels around."""
    window, near = footprint(item, scene.extent(_PAGE_SIZE), margin=2.0)
    away = np.linalg.norm(ground[window][near] - np.array(item.rgb, np.float32), axis=-1)
    return bool(away.size) and float((away < CONTRAST).mean()) <= _CLOSE
