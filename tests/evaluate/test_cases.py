"""Cases of our scenes: their pictures, questions and truths."""

import numpy as np
import pytest

from mllm_edge.errors import BadInput
from mllm_edge.evaluate.cases import SCENES, scenes
from mllm_edge.scenes import boxes, masks, sample_scene, sample_wide


@pytest.mark.parametrize("name", SCENES)
def test_truths_are_of_the_pictures_own_size(name: str) -> None:
    data = scenes(name, 8, "test")
    assert data.name == f"{name} (test)" and data.kind == SCENES[name] and len(data.cases) == 8
    for index, case in enumerate(data.cases):
        picture = case.open()
        truth = case.truth(picture)
        assert truth.texts or truth.masks or truth.boxes
        for mask in truth.masks:
            assert mask.shape == (picture.height, picture.width) and mask.any()
        if data.kind != "questions":
            wide = name.startswith("wide")
            scene = (sample_wide if wide else sample_scene)("test", index)
            side = max(picture.size)
            assert picture.size == scene.extent(side) and (wide or side == 320)
            assert all(any(np.array_equal(mask, one) for one in masks(scene, side)) for mask in truth.masks)
            assert all(list(box) in boxes(scene, side).tolist() for box in (*case.boxes, *truth.boxes))


def test_held_out_pairs_are_asked_about_in_both_series() -> None:
    for name in ("scenes-questions", "wide-questions"):
        assert len(scenes(name, 5, "held_out").cases) == 5
    with pytest.raises(BadInput, match="no split 'train'"):
        scenes("wide-questions", 1, "train")
