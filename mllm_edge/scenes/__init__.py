"""Synthetic scenes: one generator of pictures, masks and language for every system trained here."""

from mllm_edge.scenes.brief import attributes, telegram, terse
from mllm_edge.scenes.captions import GroundedCaption, caption, grounded_caption
from mllm_edge.scenes.drawing import boxes, masks, render
from mllm_edge.scenes.edits import EDIT_KINDS, Edit, edit
from mllm_edge.scenes.legible import stands_out
from mllm_edge.scenes.model import (
    ALL_COLORS,
    COLOR_RGB,
    COLORS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    Background,
    Scene,
    SceneObject,
    pick,
)
from mllm_edge.scenes.phrases import LOCATIONS, referring_expressions
from mllm_edge.scenes.questions import (
    QUESTION_KINDS,
    SHORT,
    Question,
    draw_questions,
    held_out_questions,
    placed_questions,
    questions,
    without_colors,
)
from mllm_edge.scenes.sampling import SPLITS, recolor, sample_scene, split_of
from mllm_edge.scenes.story import ToldScene, scene_text, told_scene
from mllm_edge.scenes.wide import PAGES, mixed_scene, sample_wide

__all__ = [
    "ALL_COLORS",
    "COLORS",
    "COLOR_RGB",
    "EDIT_KINDS",
    "HELD_OUT_PAIRS",
    "LOCATIONS",
    "PAGES",
    "QUESTION_KINDS",
    "SHAPES",
    "SHORT",
    "SIZES",
    "SPLITS",
    "Background",
    "Edit",
    "GroundedCaption",
    "Question",
    "Scene",
    "SceneObject",
    "ToldScene",
    "attributes",
    "boxes",
    "caption",
    "draw_questions",
    "edit",
    "grounded_caption",
    "held_out_questions",
    "masks",
    "mixed_scene",
    "pick",
    "placed_questions",
    "questions",
    "recolor",
    "referring_expressions",
    "render",
    "sample_scene",
    "sample_wide",
    "scene_text",
    "split_of",
    "stands_out",
    "telegram",
    "terse",
    "told_scene",
    "without_colors",
]
