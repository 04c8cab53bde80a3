"""What a user asks, and what follows from its words: the task, boxes as text, the tags."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mllm_edge.bundle.answers import BoxesAnswer, PicturesAnswer
from mllm_edge.bundle.manifest import Manifest
from mllm_edge.bundle.sources import Labels, Task
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answers.pictures import settled
from mllm_edge.runtime.boxes import check_boxes, spelled
from mllm_edge.runtime.images import ImageSource
from mllm_edge.runtime.turn import Drawing, InputPicture

Images = ImageSource | Sequence[ImageSource] | None
BoxList = Sequence[Sequence[float]] | None
Counts = Mapping[str, int]


@dataclass
class Asked:
    """What a user asks: words, and what they are about.

    Attributes:
        text: the question.
        images: pictures for this turn.
        boxes: x1,y1,x2,y2 each, in pixels of the dialogue's last picture.
        task: one of the bundle's tasks; "" is the one that the words suggest.
        tags: words for the prompt, instead of those that a stage finds in the picture.
        raw: `text` is the whole prompt, placeholders and control strings included; no template, no system text.
        drawing: how to make pictures.
        answer: an answer that is given (teacher forcing): nothing is generated.
    """

    text: str
    images: Images = None
    boxes: BoxList = None
    task: str = ""
    tags: Sequence[str] | None = None
    raw: bool = False
    drawing: Drawing = field(default_factory=Drawing)
    answer: str | Sequence[int] | None = None


def completed(asked: Asked, manifest: Manifest, picture: InputPicture | None) -> Asked:
    """`asked` with its task, and with boxes as words where the bundle reads them so.

    Raises:
        BadInput: an unknown task, a box that is none of the picture's, tags that cannot stand in the prompt, a question
            after a thing that does not say which, or pictures that cannot be drawn so (`check_drawing`).
    """
    _check_tags(asked.tags, manifest)
    asked = replace(asked, task=task_of(manifest, asked.text, asked.task))
    for entry in manifest.answers:
        if isinstance(entry, BoxesAnswer):
            asked = _spelled(asked, entry, picture)
            if entry.tasks and asked.task in entry.tasks and not asked.raw:
                _names_something(asked.text, asked.task, manifest)
    check_drawing(asked.drawing, manifest)
    return asked


def check_drawing(drawing: Drawing, manifest: Manifest) -> None:
    """Raise BadInput for pictures that cannot be drawn so, and for wishes of them where the bundle draws none."""
    entries = [entry for entry in manifest.answers if isinstance(entry, PicturesAnswer)]
    for entry in entries:
        settled(entry, drawing)
    plain = Drawing()
    wishes = {
        "--steps": drawing.steps != plain.steps,
        "--guidance": drawing.guidance != plain.guidance,
        "--schedule": drawing.schedule != plain.schedule,
        "--draw": drawing.count != plain.count,
        "--draw-seed": drawing.seed != plain.seed,
        "--preview-every": drawing.preview is not None,
    }
    if not entries and (given := [name for name, wished in wishes.items() if wished]):
        raise BadInput(f"this bundle ({', '.join(manifest.tasks)}) draws no pictures; leave out {', '.join(given)}")


def task_of(manifest: Manifest, text: str, task: str = "") -> str:
    """The task of a question: the one given, else the first that has a cue in its words, else the bundle's first; ""
    where the bundle has none to choose.

    Raises:
        BadInput: the bundle has no such task.
    """
    sources = [source for source in manifest.sources if isinstance(source, Task)]
    known = [name for source in sources for name in source.values]
    if task and task not in known:
        raise BadInput(f"there is no task {task!r}; this bundle has {', '.join(known) or 'none to choose'}")
    if task or not known:
        return task
    heard = text.casefold()
    cues = {name: words for source in sources for name, words in source.cues.items()}
    return next((name for name, words in cues.items() if any(word.casefold() in heard for word in words)), known[0])


def _spelled(asked: Asked, entry: BoxesAnswer, picture: InputPicture | None) -> Asked:
    """Boxes as words in the place of their placeholders."""
    places = asked.text.count(entry.placeholder) if entry.placeholder else 0
    if not places and not (asked.boxes and entry.placeholder):
        return asked
    if places != len(asked.boxes or []):
        raise BadInput(
            f"the question has {places} {entry.placeholder} for {len(asked.boxes or [])} box(es); give one box (--box) "
            "for each"
        )
    if picture is None:
        raise BadInput("boxes were given but no picture; give the picture that they are of")
    boxes = check_boxes([tuple(box) for box in asked.boxes or []], picture.image.size)
    words = iter([spelled(box, picture.image.size, entry.unit, entry.decimals) for box in boxes])
    return replace(asked, text=re.sub(re.escape(entry.placeholder), lambda _: next(words), asked.text), boxes=None)


def _names_something(text: str, task: str, manifest: Manifest) -> None:
    empty = ["", *(words.replace("{what}", "") for words in manifest.prompt.questions.values() if "{what}" in words)]
    if " ".join(text.split()) in [" ".join(words.split()) for words in empty]:
        raise BadInput(f"the question does not say what to look for (task {task}); name it, as in 'the red circle'")


def _check_tags(tags: Sequence[str] | None, manifest: Manifest) -> None:
    if tags is None:
        return
    if not any(isinstance(source, Labels) for source in manifest.sources):
        raise BadInput("this bundle reads no tags; leave them out (--tags)")
    for tag in tags:
        if not tag.strip() or re.search(r"[\[\]\n]", tag):
            raise BadInput(f"the tag {tag!r} cannot stand in the list of tags; write words without [ and ]")
