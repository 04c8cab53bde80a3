"""Masks at the picture's own size, their boxes, and COCO's run lengths."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mllm_edge.recipes.data.segmentation import decode_segmentation
from mllm_edge.runtime.answers import rle
from mllm_edge.runtime.answers.resize import at_full_size, box_of, iou, resized
from mllm_edge.runtime.preprocess import longest_side

MASKS = arrays(np.bool_, st.tuples(st.integers(1, 12), st.integers(1, 12)))


@given(MASKS)
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    form = rle.encode(mask)
    np.testing.assert_array_equal(decode_segmentation(form, *mask.shape), mask)


@given(MASKS)
def test_run_lengths_are_cocos(mask: np.ndarray) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert rle.encode(mask) == {"size": list(theirs["size"]), "counts": theirs["counts"].decode()}


def test_bilinear_is_torchs() -> None:
    import torch

    values = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    for size in ((14, 10), (3, 4), (7, 5), (20, 2)):
        ours = resized(resized(values, 0, size[0]), 1, size[1])
        theirs = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], size, mode="bilinear")
        np.testing.assert_allclose(ours, theirs[0, 0].numpy(), atol=1e-6)


def test_a_wide_pictures_mask_comes_from_the_top_of_the_square() -> None:
    # Of 8 x 4 pixels in a square of 16: rows 0..7 are the picture, whose left half is the mask.
    logits = np.full((4, 4), -1, np.float32)
    logits[:2, :2] = 1
    mask, _ = at_full_size(logits, 16, (8, 4))
    assert mask.shape == (4, 8)
    assert mask[:3, :4].all()
    assert not mask[:3, 4:].any()


@pytest.mark.parametrize("size", [(61, 37), (37, 61), (40, 40), (200, 3)])
def test_strips_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]) -> None:
    logits = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    width, height = longest_side(*size, 32)
    square = resized(resized(logits, 0, 32), 1, 32)[:height, :width]
    whole = resized(resized(square, 0, size[1]), 1, size[0])
    monkeypatch.setattr("mllm_edge.runtime.answers.resize.STRIP", 150)
    mask, sure = at_full_size(logits, 32, size)
    np.testing.assert_array_equal(mask, whole > 0)
    assert sure == pytest.approx(float(np.mean(1 / (1 + np.exp(-whole[whole > 0])))), rel=1e-5)


def test_a_large_pictures_mask_takes_little_more_than_its_own_bytes() -> None:
    logits = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    tracemalloc.start()
    mask, _ = at_full_size(logits, 1024, (6000, 6000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.nbytes == 36_000_000 and peak < 4 * mask.nbytes


def test_boxes_end_after_the_last_pixel() -> None:
    mask = np.zeros((5, 6), np.bool_)
    mask[1:3, 2:5] = True
    assert box_of(mask) == [2, 1, 5, 3]
    assert box_of(np.zeros((5, 6), np.bool_)) is None


def test_confidence_and_iou() -> None:
    assert at_full_size(np.full((2, 2), 0.5, np.float32), 4, (4, 4))[1] == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert at_full_size(np.full((2, 2), -1, np.float32), 4, (4, 4))[1] == 0
    empty = np.zeros((2, 2), np.bool_)
    assert iou(empty, empty) == 1
    assert iou(empty, ~empty) == 0
