"""Scenes in the words that GILL learns: captions, requests, lines of dialogue, and one row per thing."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np

from mllm_edge.models.gill.model import GillDims
from mllm_edge.models.gill.plan import preprocessing
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.scene_pixels import drawn
from mllm_edge.recipes.data.small_scenes import MOST, small_scene
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.scenes import (
    COLORS,
    LOCATIONS,
    SHAPES,
    SIZES,
    Scene,
    attributes,
    caption,
    draw_questions,
    questions,
    sample_scene,
    sample_wide,
)
from mllm_edge.scenes.captions import full_caption
from mllm_edge.scenes.model import Pair
from mllm_edge.scenes.phrases import location, reading_order

SLOTS = 4  # most things of a picture that is learned from
PAIRS: tuple[Pair, ...] = tuple((color, shape) for color in COLORS for shape in SHAPES)
CLASSES = {"color": COLORS, "shape": SHAPES, "size": SIZES, "place": tuple(LOCATIONS)}  # of a slot; one more is none
_FRAMES = ("There is ", "The picture shows ", "A picture of ")
_NAMED = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SHAPES)})\b")
_SIZED, _PLACED = re.compile(rf"\b({'|'.join(SIZES)})\b"), re.compile(r"\b(at|in|on) the\b")
_FULLER = 3  # of so many fuller scenes one has more than four things


def pixels(scene: Scene, dims: GillDims) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The scene as the vision encoder sees it, by the runtime's own preprocessing: float32 [3,S,S]."""
    return preprocess(drawn(scene, dims.vision.image_size), preprocessing(dims))[0]


def few_things(split: str, index: int, seed: int) -> Scene:
    """A scene of one to three things, as the small diffusion model was taught."""
    return small_scene(split, index, seed)


def fuller_scene(split: str, index: int, seed: int) -> Scene:
    """A scene of four things, of three such one of five or six, which is a wide one; none has occurred to the small
    diffusion model."""
    if index % _FULLER == 0:
        return sample_wide(split, index, seed, SLOTS + 1 + index // _FULLER % 2)
    number = index * 64  # of so many scenes one has four things, but for chances of 1e-8
    while len((scene := sample_scene(split, number, seed)).objects) <= MOST:
        number += 1
    return scene


def request(text: str) -> str:
    """A caption as somebody asks for the picture: "Draw a red circle."."""
    for frame in _FRAMES:
        text = text.removeprefix(frame)
    return f"Draw {text[0].lower()}{text[1:]}"


def dialogue(scene: Scene, rng: np.random.Generator, turns: int) -> str:
    """Lines "Q: ..." and "A: ..." of up to `turns` questions about a scene, with the end of the last line."""
    asked = draw_questions(questions(scene, rng), rng, turns)
    return "".join(f"Q: {question.question}\nA: {question.sentence}\n" for question in asked)


def row_words(scene: Scene) -> list[str]:
    """Each thing's attributes, from left to right as captions name them, with the space that tokens begin with."""
    return [" " + " ".join(attributes(scene.objects[at])) for at in reading_order(scene.objects)]


def slots(scene: Scene) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """The classes of each thing, from left to right: int64 [SLOTS] each; the number behind the last class where there
    is no thing, or no clear place."""
    things = [scene.objects[at] for at in reading_order(scene.objects)]
    found = {name: np.full(SLOTS, len(words), np.int64) for name, words in CLASSES.items()}
    for at, thing in enumerate(things):
        said = {"color": thing.color, "shape": thing.shape, "size": thing.size, "place": location(thing)}
        for name, word in said.items():
            if word is not None:
                found[name][at] = CLASSES[name].index(word)
    return found


def said_slots(scene: Scene, text: str) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """`slots` that a caption speaks of: -100 for all sizes where it has none, and for all places."""
    found = slots(scene)
    for name, said in (("size", _SIZED), ("place", _PLACED)):
        if not said.search(text):
            found[name] = np.full(SLOTS, IGNORE, np.int64)
    return found


def pairs_shown(scene: Scene) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Which of `PAIRS` the scene shows: float32 [48] in {0,1}."""
    return np.array([pair in {thing.pair for thing in scene.objects} for pair in PAIRS], np.float32)


def named(text: str) -> list[Pair]:
    """The colored shapes that a caption names, in order."""
    return [(color, shape) for color, shape in _NAMED.findall(text)]


def told_apart(split: str, many: int, seed: int) -> list[tuple[Scene, str]]:
    """Scenes of one to four things with captions that say everything, no two alike: of equal ones nobody can say which
    picture is meant."""
    found: dict[str, Scene] = {}
    for index in itertools.count():
        if len(found) == many:
            break
        scene = sample_scene(split, index, seed)
        found.setdefault(";".join(row_words(scene)), scene)
    rng = np.random.default_rng([seed, 82])
    return [(scene, full_caption(scene, rng)) for scene in found.values()]


def told(scene: Scene, index: int, seed: int) -> str:
    """A caption, the same for the same arguments."""
    return caption(scene, np.random.default_rng([seed, 81, index]))
