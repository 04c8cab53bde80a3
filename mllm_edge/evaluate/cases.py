"""Evaluation questions with their ground truth: our scenes, or files like RefCOCO's and GranD-f's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm_edge.bundle.read import read_text, sha256
from mllm_edge.errors import BadInput
from mllm_edge.models.glamm.prompts import CAPTION_QUESTIONS, GROUNDED_QUESTION, SEGMENT_TURNS
from mllm_edge.recipes.data.fields import field as field_of
from mllm_edge.recipes.data.fields import typed
from mllm_edge.recipes.data.grounded import region_caption
from mllm_edge.recipes.data.readers import (
    LARGEST,
    CocoImage,
    GroundedEntry,
    Reference,
    read_coco,
    read_grandf,
    read_refcoco,
)
from mllm_edge.recipes.data.segmentation import decode_segmentation
from mllm_edge.runtime import Model
from mllm_edge.runtime.images import load_image
from mllm_edge.scenes import (
    Scene,
    boxes,
    grounded_caption,
    held_out_questions,
    masks,
    questions,
    referring_expressions,
    render,
    sample_scene,
    sample_wide,
)
from mllm_edge.scenes.captions import full_caption

Mask = NDArray[np.bool_]
KINDS = ("questions", "referring", "grounded", "regions", "boxes", "captions")
SCENES = {f"{series}-{kind}": kind for series in ("scenes", "wide") for kind in KINDS}
PICTURES = ("scenes-drawings", "scenes-retrieval", "scenes-decisions")  # of bundles that answer with pictures
SIZE = 320  # pixels per side of a scene; wide ones have their own size
REFERRING_QUESTION = SEGMENT_TURNS[0][0]


@dataclass(frozen=True)
class Truth:
    """The right answer: accepted texts, masks with their phrases, boxes x1,y1,x2,y2 in pixels, or a scene that is to be
    drawn, with what the judge of drawings sees in its own picture."""

    texts: list[str] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    scene: Scene | None = None


@dataclass(frozen=True)
class Case:
    """One question: its words, or the name of one of the bundle's own ("locate") and what it is about. The picture and
    the truth are loaded lazily. `ask` gives what is kept of an answer, where it is not asked about its picture."""

    name: str
    question: str
    open: Callable[[], Image.Image]
    truth: Callable[[Image.Image], Truth]
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    own: tuple[str, str] | None = None
    ask: Callable[[Model], dict[str, Any]] | None = None


@dataclass(frozen=True)
class DataSet:
    """Cases of one kind: "questions" (a word or phrase), "referring" (a mask), "grounded" (a text with masks),
    "regions" (a text about a box), "boxes" (a box), "captions" (a text), "vqa" (an answer that several people gave) or
    "drawings" (a picture).

    `digest` is the SHA-256 of their source file, "" for scenes; of drawings, that of their judge.
    """

    name: str
    kind: str
    cases: list[Case]
    digest: str = ""


def scenes(name: str, number: int, split: str) -> DataSet:
    """`number` scenes of a split that no recipe trains on, of the series that the name begins with.

    Raises:
        BadInput: an unknown name or split.
    """
    check_split(split)
    kind = SCENES[name]
    sample = sample_wide if name.startswith("wide") else sample_scene
    if kind == "questions":
        possible = (_scene_question(sample(split, index), split, index) for index in count())
        return DataSet(f"{name} ({split})", kind, list(islice(filter(None, possible), number)))
    make = {
        "referring": _scene_referring,
        "grounded": _scene_grounded,
        "regions": _scene_regions,
        "boxes": _scene_boxes,
        "captions": _scene_captions,
    }[kind]
    cases = [make(sample(split, index), f"{split} {index}", index) for index in range(number)]
    return DataSet(f"{name} ({split})", kind, cases)


def check_split(split: str) -> None:
    """Raise BadInput for a split that recipes train on, or that is none."""
    if split not in ("test", "validation", "held_out"):
        raise BadInput(f"there is no split {split!r} to evaluate on; use test, validation or held_out")


def _side(scene: Scene) -> int:
    return scene.finish.side if scene.finish else SIZE


def _picture(scene: Scene) -> Callable[[], Image.Image]:
    return lambda: Image.fromarray(render(scene, _side(scene)))


def _scene_question(scene: Scene, split: str, index: int) -> Case | None:
    """One question about a scene, its kind drawn first so that all kinds weigh the same; None if there is none."""
    rng = np.random.default_rng([23, index])
    asked = (held_out_questions if split == "held_out" else questions)(scene, rng)
    if not asked:
        return None
    kind = rng.choice(sorted({question.kind for question in asked}))
    of_kind = [question for question in asked if question.kind == kind]
    question = of_kind[int(rng.integers(len(of_kind)))]
    text, answer = question.asked(short=True)
    return Case(f"{split} {index}", text, _picture(scene), lambda _: Truth([answer]))


def _scene_referring(scene: Scene, name: str, index: int) -> Case:
    expression, target = referring_expressions(scene, np.random.default_rng([61, index]))[0]
    return Case(
        name,
        REFERRING_QUESTION.format(expression),
        _picture(scene),
        lambda _: Truth(masks=[masks(scene, _side(scene))[target]], phrases=[expression]),
    )


def _scene_grounded(scene: Scene, name: str, index: int) -> Case:
    caption = grounded_caption(scene, np.random.default_rng(0), form=len(CAPTION_QUESTIONS) - 1)

    def truth(_: Image.Image) -> Truth:
        visible = masks(scene, _side(scene))
        names = [" ".join(scene.objects[number].pair) for _, _, number in caption.spans]
        return Truth([caption.text], [visible[number] for _, _, number in caption.spans], names)

    return Case(name, GROUNDED_QUESTION, _picture(scene), truth)


def _scene_regions(scene: Scene, name: str, index: int) -> Case:
    target = int(np.random.default_rng([67, index]).integers(len(scene.objects)))
    box = tuple(float(value) for value in boxes(scene, _side(scene))[target])
    text = region_caption(scene.objects[target])
    return Case(name, "", _picture(scene), lambda _: Truth([text]), [box], own=("region", ""))


def _scene_boxes(scene: Scene, name: str, index: int) -> Case:
    expression, target = referring_expressions(scene, np.random.default_rng([61, index]))[0]
    box = tuple(float(value) for value in boxes(scene, _side(scene))[target])
    return Case(name, "", _picture(scene), lambda _: Truth(boxes=[box]), own=("locate", expression))


def _scene_captions(scene: Scene, name: str, index: int) -> Case:
    text, names = full_caption(scene, np.random.default_rng(0)), [" ".join(item.pair) for item in scene.objects]
    return Case(name, "", _picture(scene), lambda _: Truth([text], phrases=names), own=("describe", ""))


def files(
    path: Path, images: Path, instances: Path | None, split: str, regions: bool = False, as_boxes: bool = False
) -> DataSet:
    """Cases from a file in the layout of GranD-f, of RefCOCO's references as JSON, of COCO's captions or of VQA v2.

    Args:
        path: the file.
        images: the folder of the pictures.
        instances: the COCO annotations that belong to references, the answers that belong to VQA's questions.
        split: which references.
        regions: ask what a reference's box holds, instead of which region the words refer to.
        as_boxes: ask for a box of what the words refer to, instead of a mask.

    Raises:
        BadInput: none of these layouts, or a malformed file.
    """
    data, digest = _contents(path), sha256(path)
    if isinstance(data, dict) and "questions" in data:
        return DataSet(path.name, "vqa", _vqa(path, data, images, instances), digest)
    if isinstance(data, dict) and "annotations" in data:
        return DataSet(
            path.name, "captions", [_captioned(image, images) for image in read_coco(path) if image.captions], digest
        )
    first = _first_entry(path, data)
    if "groundings" in first:
        return DataSet(path.name, "grounded", [_grounded(e, images) for e in read_grandf(path)], digest)
    if "ref_id" not in first:
        raise BadInput(
            f"{path} is neither GranD-f's (groundings), RefCOCO's (ref_id), COCO's captions (annotations) nor VQA's "
            "(questions) layout; see docs/glamm.md and docs/lion.md"
        )
    if instances is None:
        raise BadInput(f"{path} holds references; add --instances with the COCO annotations that came with them")
    references = read_refcoco(path, instances, split)
    name = f"{path.name} ({split})"
    if regions:
        return DataSet(name, "regions", [_region(reference, images) for reference in references], digest)
    if as_boxes:
        return DataSet(name, "boxes", list(_boxes(references, images)), digest)
    return DataSet(name, "referring", list(_referring(references, images)), digest)


def _contents(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(
            f"{path} is neither a set of ours ({', '.join((*SCENES, *PICTURES))}) nor a file; check the path"
        )
    try:
        return json.loads(read_text(path, LARGEST))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not valid JSON ({error}); check that it was copied whole") from None


def _first_entry(path: Path, data: Any) -> dict[str, Any]:
    if not isinstance(data, list) or not data or not isinstance(data[0], dict):
        raise BadInput(f"{path} is no list of objects; give GranD-f's, RefCOCO's, COCO's or VQA's layout")
    return data[0]


def _grounded(entry: GroundedEntry, images: Path) -> Case:
    def truth(picture: Image.Image) -> Truth:
        found = []
        for _, _, number in entry.spans:
            whole = np.zeros((picture.height, picture.width), np.bool_)
            for segmentation in entry.segmentations[number]:
                whole |= decode_segmentation(segmentation, picture.height, picture.width)
            found.append(whole)
        return Truth([entry.caption], found, [entry.caption[start:end] for start, end, _ in entry.spans])

    return Case(entry.file_name, GROUNDED_QUESTION, lambda: load_image(images / entry.file_name), truth)


def _referring(references: list[Reference], images: Path) -> Iterator[Case]:
    for reference in references:
        if reference.object.segmentation is None:
            raise BadInput(f"reference {reference.id} has no segmentation; use instances with masks")
        for number, sentence in enumerate(reference.sentences):
            yield _one_referring(reference, sentence, number, images)


def _one_referring(reference: Reference, sentence: str, number: int, images: Path) -> Case:
    form: Any = reference.object.segmentation

    def truth(picture: Image.Image) -> Truth:
        return Truth(masks=[decode_segmentation(form, picture.height, picture.width)], phrases=[sentence])

    question = REFERRING_QUESTION.format(sentence)
    return Case(f"{reference.id} {number}", question, lambda: load_image(images / reference.image.file_name), truth)


def _region(reference: Reference, images: Path) -> Case:
    return Case(
        str(reference.id),
        "",
        lambda: load_image(images / reference.image.file_name),
        lambda _: Truth(list(reference.sentences)),
        [reference.object.box],
        own=("region", ""),
    )


def _boxes(references: list[Reference], images: Path) -> Iterator[Case]:
    for reference in references:
        for number, sentence in enumerate(reference.sentences):
            yield _box(reference, f"{reference.id} {number}", sentence, images)


def _box(reference: Reference, name: str, sentence: str, images: Path) -> Case:
    truth = Truth(boxes=[reference.object.box])
    return Case(
        name,
        "",
        lambda: load_image(images / reference.image.file_name),
        lambda _: truth,
        own=("locate", sentence),
    )


def _captioned(image: CocoImage, images: Path) -> Case:
    truth = Truth(list(image.captions))
    return Case(
        image.file_name, "", lambda: load_image(images / image.file_name), lambda _: truth, own=("describe", "")
    )


def _vqa(path: Path, data: dict[str, Any], images: Path, answers: Path | None) -> list[Case]:
    """VQA v2 (Goyal et al. 2017): questions in one file, ten answers to each in another (`--instances`)."""
    if answers is None:
        raise BadInput(f"{path} holds questions; add --instances with the annotations that hold their answers")
    given: dict[int, list[str]] = {}
    for entry in _entries(_contents(answers), "annotations", str(answers)):
        found = _entries(entry, "answers", str(answers))
        given[field_of(int, entry, "question_id", str(answers))] = [
            field_of(str, one, "answer", str(answers)) for one in found
        ]
    return [_one_vqa(entry, given, path, images) for entry in _entries(data, "questions", str(path))]


def _one_vqa(entry: dict[str, Any], given: dict[int, list[str]], path: Path, images: Path) -> Case:
    name, picture = (field_of(int, entry, key, str(path)) for key in ("question_id", "image_id"))
    if name not in given:
        raise BadInput(f"question {name} of {path} has no answers; give both files of one split")
    question = field_of(str, entry, "question", str(path))
    return Case(str(name), question, lambda: load_image(_numbered(images, picture)), lambda _: Truth(given[name]))


def _entries(data: Any, key: str, where: str) -> list[dict[str, Any]]:
    found = field_of(list, typed(dict, data, where, "its content"), key, where)
    return [typed(dict, entry, f"{where}: {key}", "an entry") for entry in found]


def _numbered(images: Path, picture: int) -> Path:
    """The file of a COCO picture: its number with twelve digits, perhaps after the split's name."""
    for path in (images / f"{picture:012d}.jpg", *sorted(images.glob(f"*_{picture:012d}.jpg"))):
        if path.is_file():
            return path
    raise BadInput(f"{images} has no picture {picture:012d}.jpg; give the folder of the pictures (--images)")
