"""Masks at the picture's own size, their boxes, and COCO's run lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mllm_edge.recipes.data.segmentation import decode_segmentation
from mllm_edge.runtime.answers import rle
from mllm_edge.runtime.answers.resize import at_full_size, box_of, confidence, iou, resized

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
    full = at_full_size(logits, 16, (8, 4))
    assert full.shape == (4, 8)
    assert (full[:3, :4] > 0).all()
    assert (full[:3, 4:] < 0).all()


def test_boxes_end_after_the_last_pixel() -> None:
    mask = np.zeros((5, 6), np.bool_)
    mask[1:3, 2:5] = True
    assert box_of(mask) == [2, 1, 5, 3]
    assert box_of(np.zeros((5, 6), np.bool_)) is None


def test_confidence_and_iou() -> None:
    assert confidence(np.array([[0.5, -3.0]], np.float32)) == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert confidence(np.array([[-1.0]], np.float32)) == 0
    empty = np.zeros((2, 2), np.bool_)
    assert iou(empty, empty) == 1
    assert iou(empty, ~empty) == 0
