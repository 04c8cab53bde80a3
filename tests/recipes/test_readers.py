"""Readers of other people's files: what they return, and how they refuse."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.errors import BadInput
from mllm_edge.recipes.data.readers import read_coco, read_grandf, read_llava, read_refcoco
from mllm_edge.recipes.data.segmentation import decode_segmentation

CONVERSATION = {
    "id": "000000033471",
    "image": "coco/000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "What is on the bus?\n<image>"},
        {"from": "gpt", "value": "An advertisement."},
        {"from": "human", "value": "Which color?"},
        {"from": "gpt", "value": "White."},
    ],
}
INSTANCES = {
    "images": [
        {"id": 9, "file_name": "nine.jpg", "width": 8, "height": 6},
        {"id": 4, "file_name": "sub/four.jpg", "width": 5, "height": 5},
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 1, "name": "person"}],
    "annotations": [
        {
            "id": 100,
            "image_id": 9,
            "category_id": 18,
            "bbox": [2, 1, 4.5, 3],
            "iscrowd": 0,
            "segmentation": [[2, 1, 6, 1, 6, 4, 2, 4]],
        },
        {
            "id": 101,
            "image_id": 9,
            "category_id": 1,
            "bbox": [0, 0, 1, 1],
            "iscrowd": 1,
            "segmentation": {"size": [6, 8], "counts": [0, 1, 47]},
        },
    ],
}
REFS = [
    {
        "ref_id": 7,
        "ann_id": 100,
        "image_id": 9,
        "category_id": 18,
        "split": "testA",
        "sentences": [{"sent": "the dog ", "raw": "The dog"}, {"raw": "left one"}],
    },
    {"ref_id": 8, "ann_id": 101, "image_id": 9, "category_id": 1, "split": "train", "sentences": [{"sent": "man"}]},
]


def write(folder, content, name="data.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(content, keys, value):
    """A copy with the entry at a path of keys set, or deleted where the value is `...`."""
    content = copy.deepcopy(content)
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is ...:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return content


def refused(path, parts, read, *arguments):
    with pytest.raises(BadInput) as caught:
        read(path, *arguments)
    message = str(caught.value)
    assert type(caught.value) is BadInput, "not one of json's or numpy's own"
    assert "\n" not in message and "; " in message and str(path) in message, message
    for part in parts:
        assert part in message, message


# --- LLaVA ------------------------------------------------------------------------------------


def test_llava_conversations(tmp_path):
    text_only = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    first, second = read_llava(write(tmp_path, [CONVERSATION, text_only]), "/pictures")
    assert first.id == "000000033471"
    assert first.image == Path("/pictures/coco/000000033471.jpg")
    assert first.turns == (("<image>\nWhat is on the bus?", "An advertisement."), ("Which color?", "White."))
    assert (second.id, second.image, second.turns) == ("", None, (("Hi", "Hello"),))


@pytest.mark.parametrize(
    ("keys", "value", "parts"),
    [
        (["image"], "../secret.jpg", ["entry 1", "image"]),
        (["image"], "a/../../secret.jpg", ["inside the image folder"]),
        (["image"], "/etc/passwd", ["/etc/passwd"]),
        (["image"], "C:\\secret.jpg", ["inside the image folder"]),
        (["image"], "..\\secret.jpg", ["inside the image folder"]),
        (["image"], "", ["inside the image folder"]),
        (["image"], 5, ["image", "a text"]),
        (["image"], ..., ["placeholder"]),
        (["conversations"], ..., ['no "conversations"']),
        (["conversations"], [], ["end"]),
        (["conversations"], {"from": "human"}, ["a list"]),
        (["conversations", 0], "hello", ["turn 0", "an object"]),
        (["conversations", 0, "from"], "gpt", ["turn 0", "alternate"]),
        (["conversations", 1, "from"], "robot\n", ["turn 1", "alternate"]),
        (["conversations", 3], ..., ["end with an answer"]),
        (["conversations", 2, "value"], None, ["turn 2", '"value"']),
        (["conversations", 0, "value"], "no picture", ["placeholder"]),
        (["conversations", 2, "value"], "<image> again", ["placeholder"]),
        (["conversations", 1, "value"], "<image>", ["placeholder"]),
    ],
)
def test_llava_refusals(tmp_path, keys, value, parts):
    path = write(tmp_path, [CONVERSATION, changed(CONVERSATION, keys, value)])
    refused(path, ["entry 1", *parts], read_llava, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"a"', "{}", "[3]", "[" + "9" * 5000 + "]", "null"])
@pytest.mark.parametrize("read", [lambda path: read_llava(path, "."), read_coco])
def test_files_that_are_something_else(tmp_path, text, read):
    refused(write(tmp_path, text), [], read)


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(b"\xff\xfe\x00[]")
    refused(path, ["no text in UTF-8"], read_coco)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "data.json")
    refused(tmp_path / "data.json", ["no ordinary file"], read_coco)


def test_a_file_without_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mllm_edge.recipes.data.readers.LARGEST", 8)
    refused(write(tmp_path, "[" + " " * 8 + "]"), ["larger than"], read_coco)


# --- COCO -------------------------------------------------------------------------------------


def test_coco_instances(tmp_path):
    nine, four = read_coco(write(tmp_path, INSTANCES))
    assert (nine.id, nine.file_name, nine.width, nine.height) == (9, "nine.jpg", 8, 6)
    assert [(o.annotation_id, o.category, o.box, o.is_crowd) for o in nine.objects] == [
        (100, "dog", (2.0, 1.0, 6.5, 4.0), False),
        (101, "person", (0.0, 0.0, 1.0, 1.0), True),
    ]
    assert four.objects == () and four.captions == ()
    polygon, runs = (decode_segmentation(o.segmentation, nine.height, nine.width) for o in nine.objects)
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(polygon, expected)
    assert runs[0, 0] and runs.sum() == 1


def test_coco_captions(tmp_path):
    data = {
        "images": INSTANCES["images"],
        "annotations": [
            {"id": 1, "image_id": 4, "caption": "A dog runs.\n"},
            {"id": 2, "image_id": 4, "caption": "A dog."},
        ],
    }
    nine, four = read_coco(write(tmp_path, data))
    assert nine.captions == () and four.captions == ("A dog runs.", "A dog.")


@pytest.mark.parametrize(
    ("keys", "value", "parts"),
    [
        (["images"], ..., ['no "images"']),
        (["images", 1], None, ["images entry 1"]),
        (["images", 1, "id"], 9, ["images entry 1", "twice"]),
        (["images", 1, "width"], 0, ["images entry 1", "0 x 5"]),
        (["images", 1, "height"], "5", ["whole number"]),
        (["images", 1, "height"], True, ["whole number"]),
        (["images", 0, "file_name"], "../x.jpg", ["images entry 0"]),
        (["categories"], 3, ["categories", "a list"]),
        (["categories", 0, "name"], ..., ["categories entry 0", 'no "name"']),
        (["annotations", 1, "image_id"], 5, ["annotations entry 1", "not among the images"]),
        (["annotations", 1, "category_id"], 5, ["annotations entry 1", "not among the categories"]),
        (["annotations", 0, "id"], ..., ['no "id"']),
        (["annotations", 0, "bbox"], [1, 2, 3], ["annotations entry 0", "not a box"]),
        (["annotations", 0, "bbox"], [1, 2, -3, 4], ["not a box"]),
        (["annotations", 0, "bbox"], [1, 2, float("nan"), 4], ["finite"]),
        (["annotations", 0, "bbox"], [1, 2, 10**400, 4], ["finite"]),
        (["annotations", 0, "bbox"], [1, 2, "3", 4], ["finite"]),
        (["annotations", 0, "segmentation"], "abc", ["neither polygons nor run lengths"]),
        (["annotations", 0, "segmentation"], [[1, 2, 3, 4]], ["neither"]),
        (["annotations", 1, "segmentation", "counts"], ..., ["counts"]),
        (["annotations", 1, "segmentation", "size"], ..., ["size"]),
        (["annotations", 1, "caption"], 3, ["caption", "a text"]),
    ],
)
def test_coco_refusals(tmp_path, keys, value, parts):
    refused(write(tmp_path, changed(INSTANCES, keys, value)), parts, read_coco)


# --- masks ------------------------------------------------------------------------------------


def run_lengths(mask):
    """Counts of a mask, down the columns, zeros first: the plain definition, pixel by pixel."""
    counts, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return counts


def compressed(counts):
    """COCO's `rleToString`, from its C source."""
    text = ""
    for i, count in enumerate(counts):
        x = count - counts[i - 2] if i > 2 else count
        more = True
        while more:
            bits = x & 31
            x >>= 5
            more = x != -1 if bits & 16 else x != 0
            text += chr((bits | 32 if more else bits) + 48)
    return text


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_run_lengths_decode_to_the_mask_they_encode(height, width, seed, density):
    mask = np.random.default_rng(seed).random((height, width)) < density
    counts = run_lengths(mask)
    for form in (counts, compressed(counts)):
        decoded = decode_segmentation({"size": [height, width], "counts": form}, height, width)
        assert decoded.dtype == bool
        np.testing.assert_array_equal(decoded, mask)


def test_compressed_run_lengths_of_long_runs():
    mask = np.zeros((300, 400), bool)
    mask[10:290, 120:380] = True
    mask[100:120, 130:140] = False
    segmentation = {"size": [300, 400], "counts": compressed(run_lengths(mask))}
    np.testing.assert_array_equal(decode_segmentation(segmentation, 300, 400), mask)


def test_polygons_unite_and_may_leave_the_picture():
    triangle = [0, 0, 10, 0, 0, 10]
    mask = decode_segmentation([triangle, [-5, 8, 50, 8, 50, 90, -5, 90]], 10, 12)
    rows, columns = np.mgrid[:10, :12] + 0.5
    inside = (rows + columns < 10) | (rows > 8)
    on_edge = rows + columns == 10
    np.testing.assert_array_equal(mask[~on_edge], inside[~on_edge])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_polygon_area(seed):
    """A star-shaped polygon covers as many pixels as the shoelace formula says, up to its outline."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radii = rng.uniform(20, 45, 9)
    x, y = 50 + radii * np.cos(angles), 50 + radii * np.sin(angles)
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    outline = np.hypot(x - np.roll(x, -1), y - np.roll(y, -1)).sum()
    mask = decode_segmentation([np.stack([x, y], axis=1).ravel().tolist()], 100, 100)
    if np.diff(angles, append=angles[0] + 2 * np.pi).max() < np.pi:
        assert abs(mask.sum() - area) < 0.25 * outline


@pytest.mark.parametrize(
    ("segmentation", "part"),
    [
        ({"size": [4, 4], "counts": [3, 4]}, "sum 16"),
        ({"size": [4, 4], "counts": [20, -4]}, "0 or more"),
        ({"size": [4, 4], "counts": [8, True, 7]}, "whole numbers"),
        ({"size": [4, 4], "counts": [8.0, 8]}, "whole numbers"),
        ({"size": [4, 4], "counts": [10**30]}, "sum 16"),
        ({"size": [4, 4], "counts": "\u1234"}, "damaged"),
        ({"size": [4, 4], "counts": "o" * 50}, "damaged"),
        ({"size": [4, 4], "counts": "P"}, "too early"),
        ({"size": [5, 4], "counts": [20]}, "not [4, 4]"),
        ({"counts": [16]}, "size"),
        ([[0, 0, 1, 1, 2]], "neither"),
        ([[0, 0, 1, 1, 2, "x"]], "finite"),
        ([[0, 0, 1, 1, 2, 1e300]], "finite"),
        (7, "neither"),
    ],
)
def test_segmentation_refusals(segmentation, part):
    with pytest.raises(BadInput) as caught:
        decode_segmentation(segmentation, 4, 4)
    assert part in str(caught.value) and "; " in str(caught.value)


def test_a_mask_of_an_impossible_size():
    for height, width in ((0, 4), (10**6, 10**6)):
        with pytest.raises(BadInput, match="not possible"):
            decode_segmentation([], height, width)


# --- RefCOCO ----------------------------------------------------------------------------------


def test_refcoco(tmp_path):
    instances = write(tmp_path, INSTANCES, "instances.json")
    (reference,) = read_refcoco(write(tmp_path, REFS, "refs.json"), instances, "testA")
    assert reference.id == 7 and reference.sentences == ("the dog", "left one")
    assert reference.image.file_name == "nine.jpg"
    assert reference.object.category == "dog" and reference.object.box == (2.0, 1.0, 6.5, 4.0)


@pytest.mark.parametrize(
    ("keys", "value", "parts"),
    [
        ([0, "split"], "train", ["testA", "'train'"]),
        ([0, "split"], ..., ["entry 0", 'no "split"']),
        ([0, "ann_id"], 55, ["entry 0", "annotation 55"]),
        ([0, "image_id"], 4, ["entry 0", "image 4"]),
        ([0, "image_id"], 5, ["entry 0", "image 5"]),
        ([0, "sentences"], "the dog", ["a list"]),
        ([0, "sentences", 1], {}, ["sentence 1", 'no "raw"']),
        ([1], [], ["entry 1", "an object"]),
    ],
)
def test_refcoco_refusals(tmp_path, keys, value, parts):
    instances = write(tmp_path, INSTANCES, "instances.json")
    refused(write(tmp_path, changed(REFS, keys, value), "refs.json"), parts, read_refcoco, instances, "testA")


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.pkl", "refs.PKL"])
def test_pickles_are_never_opened(tmp_path, name):
    instances = write(tmp_path, INSTANCES, "instances.json")
    refused(write(tmp_path, "[]", name), ["pickle", "convert it to JSON"], read_refcoco, instances, "train")


GRANDF = [
    {
        "file_name": "nine.jpg",
        "caption": '"A dog beside a ball."',
        "groundings": {
            "a ball": {"token_positives": [13, 19], "rle_masks": [{"size": [6, 8], "counts": [0, 6, 42]}]},
            "nothing": None,
            "A dog": {"token_positives": [0, 5], "rle_masks": []},
        },
    },
    {"file_name": "bare.jpg", "caption": "Nothing.", "groundings": {}},
]


def test_grandf_in_the_order_of_the_text(tmp_path: Path) -> None:
    (entry,) = read_grandf(write(tmp_path, GRANDF))  # pictures without a grounding are left out
    assert entry.caption == "A dog beside a ball."
    assert entry.spans == ((0, 5, 1), (13, 19, 0))
    assert [len(forms) for forms in entry.segmentations] == [1, 0]


@pytest.mark.parametrize(
    ("keys", "value", "reason"),
    [
        ([0, "caption"], 7, '"caption" is 7'),
        ([0, "groundings", "a ball", "token_positives"], [13, 99], "is no part of the caption"),
        ([0, "groundings", "a ball", "token_positives"], [5, 5], "is no part of the caption"),
        ([0, "groundings", "a ball", "token_positives"], [3, 9], "overlap in the caption"),
        ([0, "groundings", "a ball", "rle_masks"], [[1, 2]], "neither polygons nor run lengths"),
        ([0, "groundings", "a ball", "rle_masks"], ..., 'there is no "rle_masks"'),
        ([0, "file_name"], "../nine.jpg", "give a path inside the image folder"),
    ],
)
def test_malformed_grandf(tmp_path: Path, keys, value, reason) -> None:
    with pytest.raises(BadInput, match=reason):
        read_grandf(write(tmp_path, changed(GRANDF, keys, value)))


def test_a_reference_without_sentences(tmp_path: Path) -> None:
    refs = write(tmp_path, changed(REFS, [0, "sentences"], []), "refs.json")
    with pytest.raises(BadInput, match='"sentences" are empty'):
        read_refcoco(refs, write(tmp_path, INSTANCES), "testA")
