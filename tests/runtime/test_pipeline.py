"""Slots of the prompt other than pictures: constants of the bundle, several tensors in one slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import CONTEXT, PATCHES, PROMPT, WIDTH
from onnx import TensorProto, helper, numpy_helper

import mllm_edge
from mllm_edge.bundle.manifest import Slot, StageEntry, TensorSpec
from mllm_edge.bundle.read import file_entry, read_manifest
from mllm_edge.bundle.sources import Boxes, Constant
from mllm_edge.errors import BadInput
from mllm_edge.runtime import Model

PICTURE = np.random.default_rng(5).integers(0, 256, (12, 20, 3), dtype=np.uint8)
SOFT = np.random.default_rng(6).standard_normal((3, WIDTH)).astype(np.float32)
SLOT = Slot("<soft>", "constant", ["soft_prompt"])


@pytest.fixture
def with_constant(tiny_bundle: Path, edit_bundle: Callable[..., Path], tmp_path: Path) -> Callable[..., Model]:
    """Loads the bundle with three rows of its own, in a prompt with these slots and this beginning."""

    def load(first: str, *slots: Slot) -> Model:
        np.save(tmp_path / "soft.npy", SOFT)
        source = Constant("soft_prompt", file_entry(tmp_path, "soft.npy"))
        known = read_manifest(tiny_bundle)
        prompt = replace(PROMPT, first=first, slots=list(slots))
        folder = edit_bundle(sources=[*known.sources, source], prompt=prompt)
        (tmp_path / "soft.npy").rename(folder / "soft.npy")
        return mllm_edge.load(folder, threads=1, kv_type="f32")

    return load


def test_a_constant_stands_where_the_template_has_it(with_constant: Callable[..., Model]) -> None:
    with with_constant("<soft>USER: {text}<soft>", SLOT, *PROMPT.slots) as model:
        lm, words = model.language_model, model.tokenize("\nwhat")
        parts = [lm.embed([1]), SOFT, lm.embed(model.tokenize("USER: ")), *model.look(PICTURE), lm.embed(words), SOFT]
        np.testing.assert_array_equal(model.prompt_embeds("what", PICTURE), np.concatenate(parts))
        answer = model.generate("what", PICTURE, max_tokens=2)
        assert answer.tokens.prompt == sum(map(len, parts))
        assert answer.tokens.image == PATCHES


def test_in_a_users_words_a_constant_is_text(with_constant: Callable[..., Model]) -> None:
    with with_constant("<soft>{text}", SLOT, *PROMPT.slots) as model:
        expected = [model.language_model.embed([1]), SOFT, model.language_model.embed(model.tokenize("a<soft>"))]
        np.testing.assert_array_equal(model.prompt_embeds("a<soft>"), np.concatenate(expected))
        raw = [model.language_model.embed([1, *model.tokenize("a")]), SOFT]
        np.testing.assert_array_equal(model.prompt_embeds("a<soft>", raw=True), np.concatenate(raw))


def test_tensors_of_one_slot_follow_each_other(with_constant: Callable[..., Model]) -> None:
    both = replace(PROMPT.slots[0], tensors=["soft_prompt", "image_embeds"])
    with with_constant("{text}", both) as model:
        (seen,) = model.look(PICTURE)
        np.testing.assert_array_equal(seen[:3], SOFT)
        assert len(seen) == 3 + PATCHES
        answer = model.generate("what", PICTURE, max_tokens=2)
        assert answer.tokens.image == 3 + PATCHES
        with pytest.raises(BadInput, match=rf"{2 * (3 + PATCHES)} of them for pictures.*{CONTEXT}"):
            model.generate("red " * CONTEXT, [PICTURE, PICTURE])


def test_a_box_may_take_several_positions(tiny_bundle: Path, edit_bundle: Callable[..., Path], tmp_path: Path) -> None:
    weights = np.random.default_rng(8).standard_normal((4, WIDTH)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["boxes", "w"], ["near"]), helper.make_node("Neg", ["near"], ["far"])]
    shapes = {"boxes": ["n", 4], "near": ["n", WIDTH], "far": ["n", WIDTH]}
    boxes, *gives = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items())
    graph = helper.make_graph(nodes, "region", [boxes], gives, [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "region.onnx")
    takes, *outputs = (TensorSpec(name, "float32", shape) for name, shape in shapes.items())  # type: ignore[arg-type]
    entry = vars(file_entry(tmp_path, "region.onnx"))
    region = StageEntry(**entry, name="region", engine="onnx", precision="fp32", inputs=[takes], outputs=outputs)
    known = read_manifest(tiny_bundle)
    prompt = replace(PROMPT, first="{text}", slots=[*PROMPT.slots, Slot("<bbox>", "boxes", ["near", "far"])])
    folder = edit_bundle(sources=[*known.sources, Boxes("boxes")], stages=[*known.stages, region], prompt=prompt)
    (tmp_path / "region.onnx").rename(folder / "region.onnx")
    with mllm_edge.load(folder, threads=1) as loaded:
        words = len(loaded.tokenize("\n")) + len(loaded.tokenize("or"))
        answer = loaded.generate("<bbox>or<bbox>", PICTURE, [(0, 0, 20, 12), (0, 0, 10, 6)], max_tokens=2)
        assert (answer.tokens.prompt, answer.tokens.image) == (1 + PATCHES + words + 2 * 2, PATCHES)
        with pytest.raises(BadInput, match="1 <bbox> placeholder"):
            loaded.generate("<bbox>", PICTURE)
