"""Dense labels of the encoder's task, by hand-computed expectations."""

import numpy as np
import torch

from mllm_edge.models.llava.model import CONFIGS
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.scene_pixels import APART, repaint
from mllm_edge.recipes.tasks.encoder import DenseModel, dense_labels, sine_positions
from mllm_edge.scenes import COLOR_RGB, COLORS, SHAPES, Background, Scene, SceneObject, sample_scene

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
    start = DenseModel(CONFIGS["tiny"]).vision_encoder.embeddings.position_embedding.weight
    torch.testing.assert_close(start.detach(), sine_positions(8, dims.width))
