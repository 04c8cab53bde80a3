"""Readers of training data that people already have: LLaVA conversations, COCO and RefCOCO.

Every refusal is a `BadInput` of one line that names the file and the entry, says what is wrong and
what to do.
"""

import json
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mllm_edge.errors import BadInput

IMAGE_PLACEHOLDER = "<image>"

Value = TypeVar("Value")
Box = tuple[float, float, float, float]
Segmentation = list[list[float]] | dict[str, Any]

_SPEAKERS = ("human", "gpt")
_MOST_PIXELS = 2**28  # a mask of one bool each; more than any photograph has
_LARGEST = 1e7  # pixels; keeps sums and quotients of coordinates finite
_MOST_GROUPS = 7  # 5 bits each: enough for 2**31 pixels and a sign
_TYPE_NAMES = {str: "a text", list: "a list", dict: "an object", int: "a whole number"}


@dataclass(frozen=True)
class Conversation:
    """A LLaVA training example.

    Attributes:
        id: The entry's own name, "" where it has none.
        image: Path of the picture; None for text alone.
        turns: Pairs of what the human said and gpt answered. The human's turn that shows the picture
            starts with "<image>\\n".
    """

    id: str
    image: Path | None
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CocoObject:
    """One COCO instance.

    Attributes:
        annotation_id: COCO's number of the annotation.
        category: Name of the category.
        box: x1, y1, x2, y2 in pixels.
        segmentation: Polygons or run lengths for `decode_segmentation`; None where the file has none.
        is_crowd: Whether it marks a group rather than one thing.
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


def read_llava(path: str | Path, image_folder: str | Path) -> list[Conversation]:
    """Reads a JSON list in the layout of llava_instruct_158k.

    Args:
        path: The JSON file.
        image_folder: Where the "image" entries are found. The pictures are not opened.

    Returns:
        The conversations in the order of the file.

    Raises:
        BadInput: The file is not such a list, the speakers do not alternate human/gpt, the
            "<image>" placeholder does not go with the "image" entry, or an image path leads out of
            the folder.
    """
    entries = _as(list, _load(path), str(path), "its content")
    return [
        _conversation(_as(dict, entry, f"{path}: entry {i}", "it"), Path(image_folder), f"{path}: entry {i}")
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
    data = _as(dict, _load(path), str(path), "its content")
    categories = {}
    for i, entry in enumerate(_as(list, data.get("categories", []), str(path), '"categories"')):
        where = f"{path}: categories entry {i}"
        entry = _as(dict, entry, where, "it")
        categories[_field(int, entry, "id", where)] = _field(str, entry, "name", where)

    images: dict[int, CocoImage] = {}
    for i, entry in enumerate(_field(list, data, "images", str(path))):
        where = f"{path}: images entry {i}"
        image = _coco_image(_as(dict, entry, where, "it"), where)
        if image.id in images:
            raise _refusal(where, f"image id {image.id} occurs twice", "give every image its own id")
        images[image.id] = image

    objects: dict[int, list[CocoObject]] = defaultdict(list)
    captions: dict[int, list[str]] = defaultdict(list)
    for i, entry in enumerate(_field(list, data, "annotations", str(path))):
        where = f"{path}: annotations entry {i}"
        entry = _as(dict, entry, where, "it")
        owner = _field(int, entry, "image_id", where)
        if owner not in images:
            raise _refusal(where, f"image_id {owner} is not among the images", "add the image or drop the entry")
        if "caption" in entry:
            captions[owner].append(_field(str, entry, "caption", where).strip())
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
        instances_path: The instances.json that came with them.
        split: Which references to return, such as "train", "val" or "testA".

    Returns:
        The references of that split in the order of the file.

    Raises:
        BadInput: A file is malformed or a pickle, the split does not occur, or a reference names an
            annotation that its image does not have.
    """
    images = {image.id: image for image in read_coco(instances_path)}
    refs = _as(list, _load(refs_path), str(refs_path), "its content")
    found: list[Reference] = []
    splits: set[str] = set()
    for i, entry in enumerate(refs):
        where = f"{refs_path}: entry {i}"
        entry = _as(dict, entry, where, "it")
        splits.add(_field(str, entry, "split", where))
        if entry["split"] == split:
            found.append(_reference(entry, images, where))
    if not found:
        raise _refusal(str(refs_path), f"no reference has the split {split!r}", f"use one of {sorted(splits)}")
    return found


def decode_segmentation(segmentation: Segmentation, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Turns a COCO segmentation into a mask.

    Args:
        segmentation: Polygons ([[x1, y1, x2, y2, ...], ...] in pixels, their union counts) or run
            lengths ({"size": [height, width], "counts": list of int or COCO's compressed string}).
        height: Rows of the picture.
        width: Columns of the picture.

    Returns:
        bool [height, width]. A pixel is in a polygon when its center is (by the even-odd rule).

    Raises:
        BadInput: The segmentation is malformed or does not have the picture's size.
    """
    where = "segmentation"
    if min(height, width) < 1 or height * width > _MOST_PIXELS:
        raise _refusal(where, f"a mask of {height} x {width} pixels is not possible", "check the picture's size")
    _check_segmentation(segmentation, height, width, where)
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return _fill_runs(_decompress(counts) if isinstance(counts, str) else counts, height, width)
    mask = np.zeros((height, width), np.bool_)
    for polygon in segmentation:
        corners = np.array([_number(value, where, "a polygon coordinate") for value in polygon]).reshape(-1, 2)
        mask |= _fill_polygon(corners, height, width)
    return mask


def _conversation(entry: dict[str, Any], folder: Path, where: str) -> Conversation:
    image = folder / _inner_path(entry, "image", where) if entry.get("image") is not None else None
    texts: list[str] = []
    for i, raw in enumerate(_field(list, entry, "conversations", where)):
        spot = f"{where}, turn {i}"
        raw = _as(dict, raw, spot, "it")
        speaker, text = _field(str, raw, "from", spot), _field(str, raw, "value", spot)
        if speaker != _SPEAKERS[i % 2]:
            wrong = f"{reprlib.repr(speaker)} speaks where {_SPEAKERS[i % 2]!r} should"
            raise _refusal(spot, wrong, "let human and gpt alternate, human first")
        texts.append(text)
    if not texts or len(texts) % 2:
        raise _refusal(where, "the conversation does not end with an answer", "end it with a turn of gpt")
    asked, answered = texts[::2], texts[1::2]
    shown = sum(text.count(IMAGE_PLACEHOLDER) for text in asked)
    if shown != int(image is not None) or any(IMAGE_PLACEHOLDER in text for text in answered):
        wrong = f"its {IMAGE_PLACEHOLDER} placeholders do not go with its images ({shown} for {1 if image else 0})"
        raise _refusal(where, wrong, 'use one, in a human turn, exactly where there is an "image"')
    turns = zip(map(_image_first, asked), answered, strict=True)
    return Conversation(str(entry.get("id", "")), image, tuple(turns))


def _image_first(text: str) -> str:
    """Moves the placeholder to the front, wherever the annotator put it, as LLaVA's second stage does."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}"


def _coco_image(entry: dict[str, Any], where: str) -> CocoImage:
    width, height = _field(int, entry, "width", where), _field(int, entry, "height", where)
    if min(width, height) < 1:
        raise _refusal(where, f"its size is {width} x {height}", "give a width and height of 1 or more")
    return CocoImage(_field(int, entry, "id", where), _inner_path(entry, "file_name", where), width, height, (), ())


def _coco_object(entry: dict[str, Any], categories: Mapping[int, str], where: str) -> CocoObject:
    category = _field(int, entry, "category_id", where)
    if category not in categories:
        raise _refusal(where, f"category_id {category} is not among the categories", "add the category")
    numbers = [_number(value, where, '"bbox"') for value in _field(list, entry, "bbox", where)]
    if len(numbers) != 4 or min(numbers[2:]) < 0:
        raise _refusal(where, '"bbox" is not a box', "give [x, y, width, height] with no negative width or height")
    x, y, width, height = numbers
    segmentation = entry.get("segmentation") or None
    if segmentation is not None:
        _check_segmentation(segmentation, None, None, where)
    return CocoObject(
        _field(int, entry, "id", where),
        categories[category],
        (x, y, x + width, y + height),
        segmentation,
        bool(entry.get("iscrowd", 0)),
    )


def _reference(entry: dict[str, Any], images: Mapping[int, CocoImage], where: str) -> Reference:
    image_id, annotation = _field(int, entry, "image_id", where), _field(int, entry, "ann_id", where)
    image = images.get(image_id)
    item = next((o for o in image.objects if o.annotation_id == annotation), None) if image else None
    if image is None or item is None:
        wrong = f"image {image_id} with annotation {annotation} is not in the instances"
        raise _refusal(where, wrong, "use the instances.json that came with these references")
    sentences = []
    for i, raw in enumerate(_field(list, entry, "sentences", where)):
        spot = f"{where}, sentence {i}"
        raw = _as(dict, raw, spot, "it")
        sentences.append(_field(str, raw, "sent" if "sent" in raw else "raw", spot).strip())
    return Reference(_field(int, entry, "ref_id", where), image, item, tuple(sentences))


def _check_segmentation(raw: object, height: int | None, width: int | None, where: str) -> None:
    """Checks the form but not the many numbers, which are looked at only when a mask is wanted."""
    if isinstance(raw, dict):
        size, counts = _field(list, raw, "size", where), raw.get("counts")
        if not isinstance(counts, (str, list)):
            raise _refusal(where, 'its run lengths have no "counts"', "give a list or COCO's compressed text")
        if height is not None and size != [height, width]:
            wrong = f"its run lengths are of size {reprlib.repr(size)}, not [{height}, {width}]"
            raise _refusal(where, wrong, "use the size of the picture it was drawn on")
    elif not isinstance(raw, list) or not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in raw):
        remedy = "give lists [x1, y1, x2, y2, x3, y3, ...] or run lengths with size and counts"
        raise _refusal(where, "it is neither polygons nor run lengths", remedy)


def _fill_polygon(corners: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Marks where a walk along each row of pixel centers has crossed an odd number of edges."""
    crossings = np.zeros((height, width + 1), np.int32)
    rows = np.arange(height) + 0.5
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        hit = np.flatnonzero((rows >= min(y1, y2)) & (rows < max(y1, y2)))
        x = x1 + (rows[hit] - y1) * ((x2 - x1) / (y2 - y1)) if hit.size else rows[hit]
        crossings[hit, np.ceil(np.clip(x - 0.5, 0, width)).astype(np.int64)] += 1
    inside: npt.NDArray[np.bool_] = np.cumsum(crossings[:, :width], axis=1) % 2 == 1
    return inside


def _fill_runs(counts: list[Any], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Lays out runs of 0, 1, 0, 1, ... down the columns, as COCO does."""
    if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != height * width:
        wrong = f"its counts are not whole numbers of 0 or more with the sum {height * width}"
        raise _refusal("segmentation", wrong, "encode the mask again")
    values = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(width, height).T)


def _decompress(text: str) -> list[int]:
    """Decodes COCO's compressed counts: 5 bits a character, low bits first, from the fourth on differences."""
    counts: list[int] = []
    value = groups = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or groups == _MOST_GROUPS:
            raise _refusal("segmentation", "its compressed counts are damaged", "encode the mask again")
        value |= (bits & 31) << (5 * groups)
        groups += 1
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << (5 * groups)
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = groups = 0
    if groups:
        raise _refusal("segmentation", "its compressed counts end too early", "encode the mask again")
    return counts


def _load(path: str | Path) -> object:
    if Path(path).suffix.lower() in (".p", ".pkl", ".pickle"):
        raise _refusal(str(path), "a pickle can run any code when read", "convert it to JSON where you trust it")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _refusal(str(path), f"it cannot be read ({error.strerror})", "check the path") from None
    except (ValueError, RecursionError) as error:
        raise _refusal(str(path), f"it is not valid JSON ({error})", "check that it was copied whole") from None


def _field(kind: type[Value], entry: dict[str, Any], key: str, where: str) -> Value:
    if key not in entry:
        raise _refusal(where, f'there is no "{key}"', "add it")
    return _as(kind, entry[key], where, f'"{key}"')


def _as(kind: type[Value], value: object, where: str, name: str) -> Value:
    # bool is a subclass of int, but true is no number of pixels.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _refusal(where, f"{name} is {reprlib.repr(value)}", f"make it {_TYPE_NAMES[kind]}")
    return value


def _number(value: object, where: str, name: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    raise _refusal(where, f"{name} has {reprlib.repr(value)}", "use finite numbers of pixels")


def _inner_path(entry: dict[str, Any], key: str, where: str) -> str:
    """Returns a relative path that stays in its folder, read as either system would read it."""
    name = _field(str, entry, key, where)
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not posix.parts or "\0" in name or posix.is_absolute() or windows.anchor or ".." in windows.parts:
        raise _refusal(where, f'"{key}" is {reprlib.repr(name)}', "give a path inside the image folder")
    return name


def _refusal(where: str, wrong: str, remedy: str) -> BadInput:
    return BadInput(f"{where}: {wrong}; {remedy}")
