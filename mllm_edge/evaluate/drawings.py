"""Pictures that a bundle draws when it is asked for scenes, and what an independent classifier finds in them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllm_edge.bundle.answers import PicturesAnswer
from mllm_edge.bundle.manifest import Manifest
from mllm_edge.bundle.read import sha256
from mllm_edge.bundle.sources import States
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.evaluate.cases import Case, DataSet, Truth, check_split
from mllm_edge.recipes.data.gill_scenes import few_things, request, told
from mllm_edge.recipes.parts import part_folder
from mllm_edge.recipes.tasks.scene_classifier import SIDE, SceneClassifier, read_classifier
from mllm_edge.runtime import Model
from mllm_edge.runtime.turn import Drawing
from mllm_edge.scenes import Scene, render

SHIPPED = "shipped/gill"  # whose parts have a classifier
SEED = 0  # of the scenes: that of the recipes, whose test split no recipe trains on


@dataclass(frozen=True)
class Judge:
    """The classifier of recipe `scene-classifier`, and the SHA-256 of its weights."""

    model: SceneClassifier
    digest: str

    def names(self, picture: Image.Image) -> list[str]:
        """The colored shapes that a picture shows, as "red circle"."""
        seen = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(seen, np.float32).transpose(2, 0, 1) / 127.5 - 1)  # [3,S,S]
        (pairs,) = self.model.pairs(pixels[None])
        return sorted(" ".join(pair) for pair in pairs)


def read_judge(folder: Path | None) -> Judge:
    """The classifier of a run's folder; None is the one that comes with the package.

    Raises:
        BadInput: there is none, or its file is damaged.
    """
    place = part_folder(SHIPPED if folder is None else str(folder))
    model = read_classifier(str(place))
    return Judge(model, sha256(place / "scene_classifier.safetensors"))


def check_draws(manifest: Manifest) -> None:
    """Raise BadInput where a bundle draws nothing."""
    if not any(isinstance(entry, PicturesAnswer) for entry in manifest.answers):
        raise BadInput(f"this bundle ({', '.join(manifest.tasks)}) draws no pictures; evaluate one that does")


def drawings(number: int, split: str, judge: Judge) -> DataSet:
    """Requests for scenes of one to three things, as the small diffusion model was taught. The picture of a case is
    the scene's own, by which the judge itself is judged; each case draws from noise of its own.

    Raises:
        BadInput: no such split.
    """
    check_split(split)
    cases = [_case(few_things(split, index, SEED), split, index, judge) for index in range(number)]
    return DataSet(f"scenes-drawings ({split})", "drawings", cases, judge.digest)


def _case(scene: Scene, split: str, index: int, judge: Judge) -> Case:
    def ask(model: Model) -> dict[str, Any]:
        picture, free = drawn(model, asked, index)
        return {"found": judge.names(picture), "free": free}

    asked = asking(scene, index)
    return Case(
        f"{split} {index}",
        asked,
        partial(_own_picture, scene),
        lambda picture: Truth(seen=judge.names(picture), scene=scene),
        ask=ask,
    )


def asking(scene: Scene, index: int) -> str:
    """The words that ask for scene `index`: its caption in the recipes, as a request."""
    return request(told(scene, index, SEED))


def _own_picture(scene: Scene) -> Image.Image:
    return Image.fromarray(render(scene, SIDE))


def drawn(model: Model, words: str, seed: int) -> tuple[Image.Image, bool]:
    """The first picture that a bundle draws when it is asked so, and whether it came freely: an answer without one is
    forced to be one, as the original's evaluation forces all (Koh et al. 2023; `gen_scale_factor`).

    Raises:
        BadInput: the bundle draws nothing.
    """
    check_draws(model.manifest)
    entry = next(entry for entry in model.manifest.answers if isinstance(entry, PicturesAnswer))
    marks = next((s.tokens for s in model.manifest.sources if isinstance(s, States) and s.name == entry.states), [])
    drawing = Drawing(seed=seed)
    most = 2 * max(len(marks), 8) - 1  # room for a few words and one group
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the answer ends before a group")  # a second one, which would not be judged
        answer = model.generate(words, drawing=drawing, max_tokens=most, temperature=0.0)
    free = any(picture.origin == "generated" for picture in answer.images)
    if not free and marks:
        answer = model.generate(words, drawing=drawing, teacher_forced="".join(marks), max_tokens=1)
    for picture in answer.images:
        if picture.origin == "generated":
            return picture.image, free
    raise MllmEdgeError(f"the bundle draws nothing for {words!r}, not even when it is forced to; export it again")
