"""Readers of common training data: LLaVA conversations, COCO, RefCOCO and GranD-f.

Every error is a one-line `BadInput` that names the file and the entry, what is wrong and what to do.
"""

import json
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mllm_edge.bundle.read import read_text
from mllm_edge.recipes.data.fields import field, number, refusal, typed
from mllm_edge.recipes.data.segmentation import Segmentation, check_segmentation

IMAGE_PLACEHOLDER = "<image>"
LARGEST = 4 << 30  # bytes of a file of annotations; LLaVA's own mixture has 1 GB

Box = tuple[float, float, float, float]

_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True)
class Conversation:
    """A LLaVA training example.

    Attributes:
        id: The entry's id, "" if it has none.
        image: Path of the picture; None for text alone.
        turns: (human, gpt) pairs. The human's turn that shows the picture starts with "<image>\\n".
    """

    id: str
    image: Path | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CocoObject:
    """One COCO instance.

    Attributes:
        annotation_id: COCO's id of the annotation.
        category: Name of the category.
        box: x1, y1, x2, y2 in pixels.
        segmentation: Polygons or run lengths for `decode_segmentation`; None if the file has none.
        is_crowd: Whether it marks a group rather than one object.
    """

    annotation_id: int
    category: str
    box: Box
    segmentation: Segmentation | None
    is_crowd: bool


@dataclass(frozen=True)
class CocoImage:
    """One COCO picture, width and height in pixels, with its instances and captions."""

    id: int
    file_name: str
    width: int
    height: int
    objects: tuple[CocoObject, ...]
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """One RefCOCO object with the expressions that people used for it."""

    id: int
    image: CocoImage
    object: CocoObject
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class GroundedEntry:
    """One picture of GranD-f with its caption.

    Attributes:
        file_name: Path of the picture in its folder.
        caption: The text.
        spans: (start, end, number of the grounding): `caption[start:end]` is a phrase. In text order.
        segmentations: For each grounding, run lengths whose union is its mask.
    """

    file_name: str
    caption: str
    spans: tuple[tuple[int, int, int], ...]
    segmentations: tuple[tuple[Segmentation, ...], ...]


def read_llava(path: str | Path, image_folder: str | Path) -> list[Conversation]:
    """Reads a JSON list in the layout of llava_instruct_158k.

    Args:
        path: The JSON file.
        image_folder: Folder of the "image" entries. The pictures are not opened.

    Returns:
        The conversations in the order of the file.

    Raises:
        BadInput: The file is not such a list, the speakers do not alternate human/gpt, the
            "<image>" placeholder does not go with the "image" entry, or an image path leads out of
            the folder.
    """
    entries = typed(list, _load(path), str(path), "its content")
    return [
        _conversation(typed(dict, entry, f"{path}: entry {i}", "it"), Path(image_folder), f"{path}: entry {i}")
        for i, entry in enumerate(entries)
    ]


def read_coco(path: str | Path) -> list[CocoImage]:
    """Reads a COCO instances_*.json or captions_*.json.

    Args:
        path: The JSON file.

    Returns:
        The pictures in the order of the file, each with its instances and captions.

    Raises:
        BadInput: The file is malformed, an annotation names an unknown picture or category, or a
            file name leads out of its folder.
    """
    data = typed(dict, _load(path), str(path), "its content")
    categories = {}
    for i, entry in enumerate(typed(list, data.get("categories", []), str(path), '"categories"')):
        where = f"{path}: categories entry {i}"
        entry = typed(dict, entry, where, "it")
        categories[field(int, entry, "id", where)] = field(str, entry, "name", where)

    images: dict[int, CocoImage] = {}
    for i, entry in enumerate(field(list, data, "images", str(path))):
        where = f"{path}: images entry {i}"
        image = _coco_image(typed(dict, entry, where, "it"), where)
        if image.id in images:
            raise refusal(where, f"image id {image.id} occurs twice", "give every image its own id")
        images[image.id] = image

    objects: dict[int, list[CocoObject]] = defaultdict(list)
    captions: dict[int, list[str]] = defaultdict(list)
    for i, entry in enumerate(field(list, data, "annotations", str(path))):
        where = f"{path}: annotations entry {i}"
        entry = typed(dict, entry, where, "it")
        owner = field(int, entry, "image_id", where)
        if owner not in images:
            raise refusal(where, f"image_id {owner} is not among the images", "add the image or drop the entry")
        if "caption" in entry:
            captions[owner].append(field(str, entry, "caption", where).strip())
        else:
            objects[owner].append(_coco_object(entry, categories, where))
    return [
        CocoImage(i.id, i.file_name, i.width, i.height, tuple(objects[i.id]), tuple(captions[i.id]))
        for i in images.values()
    ]


def read_refcoco(refs_path: str | Path, instances_path: str | Path, split: str) -> list[Reference]:
    """Reads RefCOCO, RefCOCO+ or RefCOCOg, with the references converted to JSON.

    Args:
        refs_path: JSON list of references (ref_id, ann_id, image_id, split, sentences).
        instances_path: The instances.json that belongs to them.
        split: Which references to return, such as "train", "val" or "testA".

    Returns:
        The references of that split in the order of the file.

    Raises:
        BadInput: A file is malformed or a pickle, the split does not occur, or a reference names an
            annotation that its image does not have.
    """
    images = {image.id: image for image in read_coco(instances_path)}
    refs = typed(list, _load(refs_path), str(refs_path), "its content")
    found: list[Reference] = []
    splits: set[str] = set()
    for i, entry in enumerate(refs):
        where = f"{refs_path}: entry {i}"
        entry = typed(dict, entry, where, "it")
        splits.add(field(str, entry, "split", where))
        if entry["split"] == split:
            found.append(_reference(entry, images, where))
    if not found:
        raise refusal(str(refs_path), f"no reference has the split {split!r}", f"use one of {sorted(splits)}")
    return found


def read_grandf(path: str | Path) -> list[GroundedEntry]:
    """Reads GranD-f's grounded captions (GranDf_HA_GCG_*.json, OpenPsgGCG_*.json).

    Args:
        path: JSON list of pictures (file_name, caption, groundings with token_positives and rle_masks).

    Returns:
        The pictures that have a grounding, in the order of the file.

    Raises:
        BadInput: The file is malformed, a phrase lies outside the caption or in another phrase, or a file name leads
            out of its folder.
    """
    entries = typed(list, _load(path), str(path), "its content")
    found = [_grounded(typed(dict, e, f"{path}: entry {i}", "it"), f"{path}: entry {i}") for i, e in enumerate(entries)]
    return [entry for entry in found if entry.spans]


def _grounded(entry: dict[str, Any], where: str) -> GroundedEntry:
    caption = field(str, entry, "caption", where).strip('"').strip()
    spans: list[tuple[int, int, int]] = []
    segmentations: list[tuple[Segmentation, ...]] = []
    for phrase, raw in field(dict, entry, "groundings", where).items():
        if raw is None:
            continue
        spot = f"{where}, grounding {reprlib.repr(phrase)}"
        raw = typed(dict, raw, spot, "it")
        places = field(list, raw, "token_positives", spot)
        if (
            len(places) != 2
            or any(type(p) is not int for p in places)
            or not 0 <= places[0] < places[1] <= len(caption)
        ):
            raise refusal(
                spot, f"token_positives {reprlib.repr(places)} is no part of the caption", "give [start, end]"
            )
        forms = field(list, raw, "rle_masks", spot)
        for form in forms:
            check_segmentation(form, None, None, spot)
        spans.append((places[0], places[1], len(segmentations)))
        segmentations.append(tuple(forms))
    spans.sort()
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise refusal(
                where, f"groundings {one} and {other} overlap in the caption", "give each phrase its own place"
            )
    return GroundedEntry(_inner_path(entry, "file_name", where), caption, tuple(spans), tuple(segmentations))


def _conversation(entry: dict[str, Any], folder: Path, where: str) -> Conversation:
    image = folder / _inner_path(entry, "image", where) if entry.get("image") is not None else None
    texts: list[str] = []
    for i, raw in enumerate(field(list, entry, "conversations", where)):
        spot = f"{where}, turn {i}"
        raw = typed(dict, raw, spot, "it")
        speaker, text = field(str, raw, "from", spot), field(str, raw, "value", spot)
        if speaker != _SPEAKERS[i % 2]:
            wrong = f"{reprlib.repr(speaker)} speaks where {_SPEAKERS[i % 2]!r} should"
            raise refusal(spot, wrong, "let human and gpt alternate, human first")
        texts.append(text)
    if not texts or len(texts) % 2:
        raise refusal(where, "the conversation does not end with an answer", "end it with a turn of gpt")
    asked, answered = texts[::2], texts[1::2]
    shown = sum(text.count(IMAGE_PLACEHOLDER) for text in asked)
    if shown != int(image is not None) or any(IMAGE_PLACEHOLDER in text for text in answered):
        wrong = f"its {IMAGE_PLACEHOLDER} placeholders do not go with its images ({shown} for {1 if image else 0})"
        raise refusal(where, wrong, 'use one, in a human turn, exactly where there is an "image"')
    turns = zip(map(_image_first, asked), answered, strict=True)
    return Conversation(str(entry.get("id", "")), image, tuple(turns))


def _image_first(text: str) -> str:
    """Moves the placeholder to the front, as LLaVA's second stage does."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}"


def _coco_image(entry: dict[str, Any], where: str) -> CocoImage:
    width, height = field(int, entry, "width", where), field(int, entry, "height", where)
    if min(width, height) < 1:
        raise refusal(where, f"its size is {width} x {height}", "give a width and height of 1 or more")
    return CocoImage(field(int, entry, "id", where), _inner_path(entry, "file_name", where), width, height, (), ())


def _coco_object(entry: dict[str, Any], categories: Mapping[int, str], where: str) -> CocoObject:
    category = field(int, entry, "category_id", where)
    if category not in categories:
        raise refusal(where, f"category_id {category} is not among the categories", "add the category")
    numbers = [number(value, where, '"bbox"') for value in field(list, entry, "bbox", where)]
    if len(numbers) != 4 or min(numbers[2:]) < 0:
        raise refusal(where, '"bbox" is not a box', "give [x, y, width, height] with no negative width or height")
    x, y, width, height = numbers
    segmentation = entry.get("segmentation") or None
    if segmentation is not None:
        check_segmentation(segmentation, None, None, where)
    return CocoObject(
        field(int, entry, "id", where),
        categories[category],
        (x, y, x + width, y + height),
        segmentation,
        bool(entry.get("iscrowd", 0)),
    )


def _reference(entry: dict[str, Any], images: Mapping[int, CocoImage], where: str) -> Reference:
    image_id, annotation = field(int, entry, "image_id", where), field(int, entry, "ann_id", where)
    image = images.get(image_id)
    item = next((o for o in image.objects if o.annotation_id == annotation), None) if image else None
    if image is None or item is None:
        wrong = f"image {image_id} with annotation {annotation} is not in the instances"
        raise refusal(where, wrong, "use the instances.json that came with these references")
    sentences = []
    for i, raw in enumerate(field(list, entry, "sentences", where)):
        spot = f"{where}, sentence {i}"
        raw = typed(dict, raw, spot, "it")
        sentences.append(field(str, raw, "sent" if "sent" in raw else "raw", spot).strip())
    if not sentences:
        raise refusal(where, 'its "sentences" are empty', "add one or drop the entry")
    return Reference(field(int, entry, "ref_id", where), image, item, tuple(sentences))


def _load(path: str | Path) -> object:
    if Path(path).suffix.lower() in (".p", ".pkl", ".pickle"):
        raise refusal(str(path), "a pickle can run any code when read", "convert it to JSON where you trust it")
    try:
        return json.loads(read_text(Path(path), LARGEST))
    except OSError as error:
        raise refusal(str(path), f"it cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise refusal(str(path), f"it is not valid JSON ({error})", "check that it was copied whole") from None


def _inner_path(entry: dict[str, Any], key: str, where: str) -> str:
    """Returns a relative path that stays in its folder under both POSIX and Windows rules."""
    name = field(str, entry, key, where)
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not posix.parts or "\0" in name or posix.is_absolute() or windows.anchor or ".." in windows.parts:
        raise refusal(where, f'"{key}" is {reprlib.repr(name)}', "give a path inside the image folder")
    return name
