"""What LION reads and says: a picture, tags behind a learned vector, a question (`models/lion_t5.py`)."""

from __future__ import annotations

from mllm_edge.bundle.answers import BoxesAnswer
from mllm_edge.bundle.manifest import Prompt, Slot
from mllm_edge.models.lion.model import IMAGE, REGION

SOFT = "<extra_id_0>"
PICTURE = "<picture>"  # not <image>, which LION's own questions have as words
TASK = "<task>"
BOX_PLACE = "<bbox>"  # in a question, for a box that is spelled there
TASKS = {"vqa": IMAGE, "caption": IMAGE, "rec": REGION, "reg": REGION}  # the router's rows
CUES = {
    "rec": ["coordinates", "bounding box", "locate"],
    "reg": ["region", " at ["],
    "caption": ["describe", "caption", "what is in the picture", "what is in the image"],
}
CAPTION_QUESTIONS = (
    "Please describe the image using a single short sentence.",
    "Describe the picture.",
    "What is in the picture?",
)
REC_QUESTIONS = (
    "In the image <image>, can you locate {what} and let me know its coordinates?",
    "Where is {what}? Answer with its coordinates.",
)
REG_QUESTIONS = ("What is in the region {box} of the image?", "What do you see at {box}?")
BOX = BoxesAnswer(
    r"\[([0-9.]+), ?([0-9.]+), ?([0-9.]+), ?([0-9.]+)\]", decimals=3, unit=1.0, tasks=["rec"], placeholder=BOX_PLACE
)
TAGGED = f"According to {SOFT}, you are allowed to use or partially use the following tags: [{{tags}}]. "


def prompt(visual: list[str], tasks: bool, tags: bool) -> Prompt:
    """LION's template.

    Args:
        visual: the tensors of a picture, in the order of their rows.
        tasks: whether the type of task stands in front.
        tags: whether tags are given.
    """
    first = (TASK if tasks else "") + PICTURE + (TAGGED if tags else "") + "{text}</s>"
    slots = [Slot(PICTURE, "pixels", visual)]
    if tasks:
        slots.append(Slot(TASK, "constant", ["task_row"]))
    if tags:
        slots.append(Slot(SOFT, "constant", ["soft_prompt"]))
    questions = {"describe": CAPTION_QUESTIONS[0]}
    if tasks:
        questions |= {"locate": REC_QUESTIONS[0], "region": REG_QUESTIONS[0].format(box=BOX_PLACE)}
    return Prompt("lion", "", first, first, "{text}", [], slots, questions)
