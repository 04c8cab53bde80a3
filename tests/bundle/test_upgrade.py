"""Bundles of schema 1, made once by the code before schema 2 (seeded weights), with what that code answered."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mllm_edge
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import Boxes, Pixels, States
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answers.resize import iou

HOME = Path(__file__).parents[1] / "fixtures" / "schema1"
ANSWERS = json.loads((HOME / "answers.json").read_text(encoding="utf-8"))
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)


@pytest.mark.parametrize("system", ["llava", "glamm"])
def test_tokens_are_those_of_before(system: str) -> None:
    wanted = ANSWERS[system]
    with mllm_edge.load(HOME / system, threads=1) as model:
        assert model.generate("What is in the picture?", PICTURE, max_tokens=24).tokens.ids == wanted["ids"]
        chat = model.chat(max_tokens=12)
        chat.ask("What is this?", PICTURE)
        assert chat.ask("How many?").tokens.ids == wanted["second turn"]


def test_regions_and_masks_are_those_of_before() -> None:
    coco = pytest.importorskip("pycocotools.mask")
    wanted = ANSWERS["glamm"]
    box = [5, 6, 30, 33]
    with mllm_edge.load(HOME / "glamm", threads=1) as model:
        region = model.generate("What is <bbox>?", PICTURE, [box], max_tokens=24)
        assert region.tokens.ids == wanted["region"]
        forced = "<p> It </p> [SEG] and <p> them </p> [SEG]."
        answer = model.generate("Segment <bbox>.", PICTURE, [box], teacher_forced=forced)
    assert [mask.phrase for mask in answer.masks] == [phrase for phrase, _ in wanted["masks"]]
    # Equal bits where it was made; another CPU or ONNX Runtime rounds a border's logits to the other side of 0.
    before = [coco.decode(rle).astype(bool) for _, rle in wanted["masks"]]
    assert min(iou(mask.pixels, old) for mask, old in zip(answer.masks, before)) > 0.95


def test_reserved_names_became_data() -> None:
    manifest = read_manifest(HOME / "glamm")
    assert manifest.schema == 2
    pixels, mask_pixels, boxes, states = manifest.sources
    assert isinstance(pixels, Pixels) and (pixels.name, pixels.size, pixels.fit) == ("pixel_values", 32, "crop")
    assert isinstance(mask_pixels, Pixels) and (mask_pixels.name, mask_pixels.fit) == ("mask_pixel_values", "longest")
    assert boxes == Boxes("boxes")
    assert states == States("seg_states", ["[SEG]"], at="before")
    assert [(slot.placeholder, slot.of, slot.tensors) for slot in manifest.prompt.slots] == [
        ("<image>", "pixels", ["image_embeds"]),
        ("<bbox>", "boxes", ["region_embeds"]),
    ]
    assert (manifest.prompt.slots[0].open, manifest.prompt.slots[0].close) == ("<im_start>", "<im_end>")
    (masks,) = manifest.answers
    assert (masks.kind, masks.frame) == ("masks", 32)  # type: ignore[union-attr]
    assert manifest.build.axes == {"boxes": [1, 4, 16], "masks": [1, 4, 16]}
    lm = manifest.language_model
    assert lm.gguf and (lm.context, lm.width, lm.gguf.layers, lm.gguf.kv_width) == (256, 64, 2, 32)
    assert lm.kv_bytes_per_token == 2 * 2 * 2 * 32  # keys and values, 16 bits, 2 layers, 32 channels
    assert manifest.tokenizers[0].added[:2] == ["<im_start>", "<im_end>"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=80)
@given(data=st.data(), value=json_values)
def test_any_value_anywhere_is_upgraded_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("old")
    old = json.loads((HOME / "glamm" / "bundle.json").read_text(encoding="utf-8"))
    node: Any = old
    while True:
        key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        inner = node[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            node[key] = value
            break
        node = inner
    (folder / "bundle.json").write_text(json.dumps(old), encoding="utf-8")
    for file in (HOME / "glamm").glob("*.[go]*"):
        shutil.copy(file, folder)
    message = ""
    try:
        read_manifest(folder, verify_hash=False)
    except BadInput as error:
        message = str(error)
    assert "\n" not in message
