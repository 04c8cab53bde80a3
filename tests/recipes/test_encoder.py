"""Dense labels of the encoder's task, by hand-computed expectations."""

import numpy as np
import pytest
import torch

from mllm_edge.errors import BadInput
from mllm_edge.models.llava.model import CONFIGS
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.mixture import wide_share
from mllm_edge.recipes.data.scene_pixels import APART, padded_centers, pixels, repaint, square_masks
from mllm_edge.recipes.parts import read_part
from mllm_edge.recipes.recipe import load
from mllm_edge.recipes.tasks.encoder import DenseModel, EncoderTask, dense_labels, sine_positions
from mllm_edge.scenes import COLOR_RGB, COLORS, PAGES, SHAPES, Background, Scene, SceneObject, sample_scene
from mllm_edge.scenes.model import Finish

PLAIN = Background("plain", (60, 60, 60), (60, 60, 60), 0.0, 0)


def test_labels_of_two_squares() -> None:
    # A square of half side 0.88 x 0.142 = 0.125: exactly the four patches of 1/8 around its center.
    large = SceneObject("red", "square", "large", 0.25, 0.25, 0.125 / 0.88, 0.0, COLOR_RGB["red"])
    small = SceneObject("blue", "square", "small", 0.8125, 0.9375, 0.0625 / 0.88, 0.0, COLOR_RGB["blue"])
    labels = dense_labels(Scene((large, small), PLAIN), grid=8, size=128)
    covered = {9: 0, 10: 0, 17: 0, 18: 0, 62: 1}
    assert np.flatnonzero(labels["object"]).tolist() == sorted(covered)
    for patch in range(64):
        expected = (
            [("red", 0, (0.25, 0.25)), ("blue", 8, (0.8125, 0.9375))][covered[patch]] if patch in covered else None
        )
        if expected is None:
            assert labels["color"][patch] == labels["shape"][patch] == labels["cell"][patch] == IGNORE
            continue
        color, cell, place = expected
        assert labels["color"][patch] == COLORS.index(color)
        assert labels["shape"][patch] == SHAPES.index("square")
        assert labels["cell"][patch] == cell
        np.testing.assert_allclose(labels["place"][patch], place)
    assert np.flatnonzero(labels["center"]).tolist() == [18, 62]


def test_the_hole_of_a_ring_is_the_rings() -> None:
    ring = SceneObject("white", "ring", "large", 0.5625, 0.5625, 0.18, 0.0, COLOR_RGB["white"])
    labels = dense_labels(Scene((ring,), PLAIN), grid=8, size=128)
    assert labels["center"][4 * 8 + 4] == labels["object"][4 * 8 + 4] == 1
    assert labels["shape"][4 * 8 + 4] == SHAPES.index("ring")


def test_repainted_objects_have_no_named_color() -> None:
    for index in range(50):
        scene = sample_scene("train", index)
        painted = repaint(scene, np.random.default_rng(index))
        assert [o.shape for o in painted.objects] == [o.shape for o in scene.objects]
        for item in painted.objects:
            assert min(np.linalg.norm(np.subtract(item.rgb, rgb)) for rgb in COLOR_RGB.values()) >= APART - 2


def test_positions_start_as_sines_of_column_and_row() -> None:
    table = sine_positions(grid=4, width=16)
    assert table.shape == (17, 16)
    assert not table[0].any()
    column, row = 3, 2
    vector = table[1 + row * 4 + column]
    steps = torch.tensor([1.0, 0.1, 0.01, 0.001])  # 10000 ** (-k / 4)
    torch.testing.assert_close(vector[:8], torch.cat([(column * steps).sin(), (column * steps).cos()]))
    torch.testing.assert_close(vector[8:], torch.cat([(row * steps).sin(), (row * steps).cos()]))
    dims = CONFIGS["tiny"].vision
    start = DenseModel(CONFIGS["tiny"].vision).vision_encoder.embeddings.position_embedding.weight
    torch.testing.assert_close(start.detach(), sine_positions(8, dims.width))


def test_labels_of_a_wide_picture_follow_the_padding() -> None:
    # 2:1, so that the picture is rows 2 to 5 of 8. At its bottom right: the place is of the picture, the patch of the
    # padded square.
    item = SceneObject("red", "square", "large", 0.875, 0.75, 0.0625 / 0.88, 0.0, (255, 0, 0))
    finish = Finish(256, 1.0, "distance", (1.0, 1.0, 1.0), 1.0, 0.0, 0)
    scene = Scene((item,), Background("paper", (255, 255, 255), (90, 160, 200), 0.0, 0), 2.0, finish)
    labels = dense_labels(scene, grid=8, size=128)
    np.testing.assert_allclose(padded_centers(scene), [[0.875, 0.625]])
    assert np.flatnonzero(labels["object"]).tolist() == [38, 39, 46, 47]
    assert np.flatnonzero(labels["center"]).tolist() == [5 * 8 + 7]
    assert labels["cell"][39] == 8 and labels["place"][39].tolist() == [0.875, 0.75]
    assert labels["count"] == 0 and list(PAGES)[labels["page"]] == "paper"
    # The runtime's own preprocessing pads the same way: the object's pixels lie where the labels say.
    seen = pixels(scene, CONFIGS["tiny"])
    red = (seen[0] > 1.5) & (seen[1] < -1.0)
    truth = square_masks(scene, 128, centered=True)[0]
    assert (red & truth).sum() / (red | truth).sum() > 0.95
    cornered = square_masks(scene, 128, centered=False)[0]
    np.testing.assert_array_equal(cornered[:64], truth[32:96])


def test_the_encoder_that_ships_sees_both_kinds_of_scenes() -> None:
    task = EncoderTask(load("encoder-wide", ["init.vision_encoder=shipped"]))
    dims, held = CONFIGS["tiny"].vision, read_part("shipped", "vision_encoder")
    assert {name: value.shape for name, value in task.model.vision_encoder.state_dict().items()} == {
        name: value.shape for name, value in held.items()
    }
    assert held["embeddings.patch_embedding.weight"].shape[0] == dims.width
    series = {task.sample(index)["page"].item() for index in range(30)}
    assert len(series) > 3  # the mixture has pages that scenes lack


def test_the_share_of_wide_scenes_is_checked() -> None:
    assert wide_share({}) == 0.0 and wide_share({"wide": 1}) == 1.0
    for wrong in (1.5, -0.1, "half", True):
        with pytest.raises(BadInput, match=r"data\.wide .* 0 to 1"):
            wide_share({"wide": wrong})
