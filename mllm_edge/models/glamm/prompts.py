"""What GLaMM is asked about a picture, and the form of its answers (groundingLMM dataset/utils)."""

from __future__ import annotations

from dataclasses import replace

from mllm_edge.bundle.manifest import Slot
from mllm_edge.models.llava.prompts import PICTURE, PROMPTS

SEG, PHRASE, PHRASE_END, BOX = "[SEG]", "<p>", "</p>", "<bbox>"

_INTERLEAVED = "Please respond with interleaved segmentation masks for the corresponding parts of the answer."
# Each asks for the caption of the same number (`grounded_caption`), so that the wording does not hang on chance.
CAPTION_QUESTIONS: tuple[str, ...] = (
    f"What is in the picture? {_INTERLEAVED}",
    f"Please describe in detail the contents of the image. {_INTERLEAVED}",
    f"Can you provide a thorough description of this image? {_INTERLEAVED}",
    f"Could you please give me a detailed description of the image? {_INTERLEAVED}",
)
GROUNDED_QUESTION = CAPTION_QUESTIONS[-1]  # the one that asks for everything
# Questions with their answers. The original draws both independently; a small model's choice would then be a toss-up.
SEGMENT_TURNS: tuple[tuple[str, str], ...] = (
    ("Please segment {} in this image.", f"Sure, it is {SEG}."),
    ("Can you segment {} in this image?", f"Sure, {SEG}."),
    ("What is {} in this image? Please respond with segmentation mask.", f"It is {SEG}."),
    ("Segment {}.", f"Sure, the segmentation result is {SEG}."),
)
REGION_QUESTIONS: tuple[str, ...] = (
    f"Can you provide me with a detailed description of the region in the picture marked by {BOX}?",
    f"What can you say about the region marked by {BOX}?",
    f"Describe the region {BOX}.",
    f"What is {BOX}?",
)
TEACHER_FORCED = SEGMENT_TURNS[0][1]  # an answer to give where the mask alone is judged

# LLaVA's v1 template with the picture's place marked and introduced (groundingLMM app.py)
PROMPT = replace(
    PROMPTS["llava_v1"],
    name="glamm",
    slots=[
        replace(
            PICTURE,
            open="<im_start>",
            close="<im_end>",
            joint="The <image> provides an overview of the picture.\n",
        ),
        Slot(BOX, "boxes", ["region_embeds"]),
    ],
    questions={
        "describe": GROUNDED_QUESTION,
        "segment": SEGMENT_TURNS[0][0].format("{what}"),
        "region": REGION_QUESTIONS[0],
    },
)
