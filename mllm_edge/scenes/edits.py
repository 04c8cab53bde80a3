"""Instructed changes of one object: the scene before, the scene after and the words for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from mllm_edge.scenes.legible import is_legible
from mllm_edge.scenes.model import COLORS, SHAPES, Scene, SceneObject, pick, shuffled
from mllm_edge.scenes.phrases import referring_expressions, with_article
from mllm_edge.scenes.sampling import jittered_rgb

EDIT_KINDS: tuple[str, ...] = ("recolor", "replace", "remove")
_RECOLOR = ("Make {} {}.", "Paint {} {}.", "Change the color of {} to {}.")
_REPLACE = ("Turn {} into {}.", "Replace {} with {}.", "Change {} into {}.")
_REMOVE = ("Remove {}.", "Delete {}.", "Take away {}.")


@dataclass(frozen=True)
class Edit:
    """One instructed change.

    Attributes:
        instruction: What to do, with a name that fits only the target.
        kind: One of `EDIT_KINDS`.
        target: Index of the changed object in `before`.
        before: The scene as given.
        after: The edited scene; all other objects and the background are unchanged.
    """

    instruction: str
    kind: str
    target: int
    before: Scene
    after: Scene


def edit(scene: Scene, rng: np.random.Generator) -> Edit:
    """Draws a change of one object of a scene.

    The edited scene is as legible as any sampled one, has at least one object, no held-out pair unless
    the scene already had one, and stays in the same split.

    Args:
        scene: The scene to change.
        rng: Chooses the kind, the target and the words.

    Returns:
        The edit. All kinds are equally likely, but a single object is never removed.

    Raises:
        ValueError: No object of the scene can be named or changed (not so for any sampled scene).
    """
    names = referring_expressions(scene, rng)
    for kind in shuffled(rng, EDIT_KINDS):
        for name, target in names:
            for instruction, changed in _changes(kind, name, scene.objects[target], rng):
                objects = scene.objects[:target] + changed + scene.objects[target + 1 :]
                after = replace(scene, objects=objects)
                shows_no_new_pair = scene.shows_held_out_pair or not after.shows_held_out_pair
                if objects and shows_no_new_pair and is_legible(after):
                    return Edit(instruction, kind, target, scene, after)
    raise ValueError("no object of this scene can be named and changed; use a scene of sample_scene")


def _changes(
    kind: str, name: str, item: SceneObject, rng: np.random.Generator
) -> Iterator[tuple[str, tuple[SceneObject, ...]]]:
    """Yields instructions of one kind, each with the object's replacement."""
    if kind == "remove":
        yield pick(rng, _REMOVE).format(name), ()
    elif kind == "recolor":
        for color in shuffled(rng, [color for color in COLORS if color != item.color]):
            changed = replace(item, color=color, rgb=jittered_rgb(color, rng))
            yield pick(rng, _RECOLOR).format(name, color), (changed,)
    else:
        for shape in shuffled(rng, [shape for shape in SHAPES if shape != item.shape]):
            yield pick(rng, _REPLACE).format(name, with_article(shape)), (replace(item, shape=shape),)
