"""What GLaMM is asked about a picture, and the form of its answers (groundingLMM dataset/utils)."""

from __future__ import annotations

from collections.abc import Sequence

from mllm_edge.recipes.scenes import SceneObject
from mllm_edge.recipes.scenes.phrases import capitalized, full_description, with_article

SEG, PHRASE, PHRASE_END, BOX = "[SEG]", "<p>", "</p>", "<bbox>"

_INTERLEAVED = "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
CAPTION_QUESTIONS: tuple[str, ...] = (
    f"Could you please give me a detailed description of the image? {_INTERLEAVED}",
    f"Can you provide a thorough description of this image? {_INTERLEAVED}",
    f"Please describe in detail the contents of the image. {_INTERLEAVED}",
    f"What is in the picture? {_INTERLEAVED}",
)
SEGMENT_QUESTIONS: tuple[str, ...] = (
    "Please segment {} in this image.",
    "Can you segment {} in this image?",
    "What is {} in this image? Please respond with segmentation mask.",
    "Segment {}.",
)
SEGMENT_ANSWERS: tuple[str, ...] = (
    f"It is {SEG}.",
    f"Sure, {SEG}.",
    f"Sure, it is {SEG}.",
    f"Sure, the segmentation result is {SEG}.",
    f"{SEG}.",
)
REGION_QUESTIONS: tuple[str, ...] = (
    "Can you provide me with a detailed description of the region in the picture marked by {}?",
    "What can you say about the region marked by {}?",
    "Describe the region {}.",
    "What is {}?",
)


def tagged(text: str, spans: Sequence[tuple[int, int, int]]) -> str:
    """`text` with `<p> phrase </p> [SEG]` at each (start, end, number) of `spans`, which are in the order of the text."""
    parts, end = [], 0
    for start, stop, _ in spans:
        parts += [text[end:start], f"{PHRASE} {text[start:stop]} {PHRASE_END} {SEG}"]
        end = stop
    return "".join([*parts, text[end:]])


def region_caption(item: SceneObject) -> str:
    """What a region that holds one object is called: "A large red circle."."""
    return capitalized(with_article(str(full_description(item)))) + "."
