"""Scenes: what is sampled, what is drawn of it and how edits change it."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_edge.scenes import (
    ALL_COLORS,
    COLOR_RGB,
    COLORS,
    EDIT_KINDS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    SPLITS,
    Background,
    Scene,
    SceneObject,
    boxes,
    edit,
    masks,
    questions,
    recolor,
    render,
    sample_scene,
    split_of,
    without_colors,
)

PLAIN = Background("plain", (60, 60, 60), (60, 60, 60), 0.0, 0)


def thing(color="red", shape="square", size="large", x=0.5, y=0.5, radius=0.16, angle=0.0):
    return SceneObject(color, shape, size, x, y, radius, angle, COLOR_RGB[color])


def grown(mask, by):
    """The mask and all pixels at most `by` rows and columns away."""
    padded = np.pad(mask, by)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y, x in np.ndindex(2 * by + 1, 2 * by + 1)], axis=0)


def scenes(split, count, seed=0):
    return [sample_scene(split, index, seed) for index in range(count)]


def rng(number=0):
    return np.random.default_rng(number)


# --- sampling ---------------------------------------------------------------------------------


def test_same_arguments_same_scene():
    for split in SPLITS:
        assert sample_scene(split, 7, 3) == sample_scene(split, 7, 3)
    one = sample_scene("train", 7, 3)
    assert one.fingerprint() == sample_scene("train", 7, 3).fingerprint()
    assert one != sample_scene("train", 8, 3) and one != sample_scene("train", 7, 4)
    np.testing.assert_array_equal(render(one), render(sample_scene("train", 7, 3)))


def test_a_known_scene_stays_what_it_is():
    """Trained weights and reported numbers rest on these scenes: a change must be noticed."""
    assert sample_scene("test", 0).fingerprint().startswith("80e76b82471a0cb4")


def test_splits_are_disjoint_and_read_off_the_scene():
    fingerprints = {split: {s.fingerprint() for s in scenes(split, 120)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not fingerprints[one] & fingerprints[other]
    for split in SPLITS:
        assert len(fingerprints[split]) == 120
        assert {split_of(scene) for scene in scenes(split, 120, seed=5)} == {split}


def test_held_out_pairs_only_in_their_split():
    for split in ("train", "validation", "test"):
        for scene in scenes(split, 250):
            assert not any((o.color, o.shape) in HELD_OUT_PAIRS for o in scene.objects)
    for scene in scenes("held_out", 150):
        assert any((o.color, o.shape) in HELD_OUT_PAIRS for o in scene.objects)


def test_every_word_is_seen_often_in_train():
    seen = [o for scene in scenes("train", 400) for o in scene.objects]
    for words, attribute in ((COLORS, "color"), (SHAPES, "shape"), (SIZES, "size")):
        counts = Counter(getattr(o, attribute) for o in seen)
        assert set(counts) == set(words)
        assert min(counts.values()) > 0.5 * len(seen) / len(words)
    assert {len(scene.objects) for scene in scenes("train", 100)} == {1, 2, 3, 4}


@pytest.mark.parametrize(("split", "index", "seed"), [("dev", 0, 0), ("train", -1, 0), ("train", 0, -1)])
def test_impossible_scenes_are_refused(split, index, seed):
    with pytest.raises(ValueError, match=r"use one of: train, validation, test, held_out|0 or more"):
        sample_scene(split, index, seed)


def test_other_colors_come_into_training_without_a_held_out_pair():
    recolored = Counter()
    for index in range(300):
        scene = sample_scene("train", index)
        other = recolor(scene, np.random.default_rng(index))
        assert not other.shows_held_out_pair
        assert split_of(other) == "train"
        for before, after in zip(scene.objects, other.objects, strict=True):
            assert after == before or after.color in set(ALL_COLORS) - set(COLORS)
            assert replace(after, color=before.color, rgb=before.rgb) == before
            recolored[after.color] += 1
        asked = questions(other, np.random.default_rng(index))
        named = {color for color in ALL_COLORS if any(color in q.question for q in asked)}
        if all(item.color in COLORS for item in other.objects):
            assert named <= set(COLORS)
        shown = {item.color for item in other.objects}
        assert without_colors(asked) == [
            q for q in asked if not any(c in f"{q.question} {q.sentence}" for c in shown | named)
        ]
    assert set(recolored) == set(ALL_COLORS)
    others = sum(recolored[color] for color in set(ALL_COLORS) - set(COLORS))
    assert 0.5 < others / recolored.total() < 0.65


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="'gray'"):
        replace(thing(), color="gray")


# --- pictures ---------------------------------------------------------------------------------


def test_square_mask_is_the_hand_computed_one():
    # Half side 0.88 * 0.1 = 0.088 pictures = 8.8 pixels about pixel 50: centers 41.5 to 58.5.
    scene = Scene((thing(radius=0.1),), PLAIN)
    expected = np.zeros((100, 100), bool)
    expected[41:59, 41:59] = True
    np.testing.assert_array_equal(masks(scene, 100)[0], expected)
    assert boxes(scene, 100).tolist() == [[41, 41, 59, 59]]
    picture = render(scene, 100)
    assert (picture[42:58, 42:58] == COLOR_RGB["red"]).all()
    assert (picture[~np.pad(expected[40:60, 40:60], 40)] == 60).mean() > 0.95


@pytest.mark.parametrize("angle", [0.0, 0.2])
@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", math.pi),
        ("square", (2 * 0.88) ** 2),
        ("triangle", 3 * math.sqrt(3) * 0.6**2),
        ("star", 10 * 0.5 * 1.25 * 0.58 * math.sin(math.pi / 5)),
        ("cross", 2 * 2.2 * 0.76 - 0.76**2),
        ("ring", math.pi * (1.0**2 - 0.56**2)),
    ],
)
def test_areas_are_the_analytic_ones(shape, area, angle):
    scene = Scene((thing(shape=shape, radius=0.17, angle=angle),), PLAIN)
    # A straight upright edge may gain or lose a column of pixels: look closely.
    assert masks(scene, 700).sum() == pytest.approx(area * (0.17 * 700) ** 2, rel=0.02)
    # Smooth edges keep the mean: the red above the background is the area times the contrast.
    red = (render(scene, 128)[..., 0].astype(float) - 60).sum() / (COLOR_RGB["red"][0] - 60)
    assert red == pytest.approx(area * (0.17 * 128) ** 2, rel=0.02)


def test_the_later_object_lies_on_top():
    below, above = thing(x=0.45), thing("blue", "circle", x=0.6)
    scene = Scene((below, above), PLAIN)
    under, over = masks(scene)
    assert not (under & over).any()
    np.testing.assert_array_equal(over, masks(Scene((above,), PLAIN))[0])
    np.testing.assert_array_equal(under, masks(Scene((below,), PLAIN))[0] & ~over)
    inner = over & np.roll(over, 2, 0) & np.roll(over, -2, 0) & np.roll(over, 2, 1) & np.roll(over, -2, 1)
    assert (render(scene)[inner] == COLOR_RGB["blue"]).all()


def test_masks_boxes_and_pictures_agree():
    for scene in scenes("train", 60):
        shown, extents = masks(scene, 96), boxes(scene, 96)
        assert shown.shape == (len(scene.objects), 96, 96) and extents.shape == (len(scene.objects), 4)
        assert shown.sum(axis=0).max() <= 1
        for mask, (x1, y1, x2, y2) in zip(shown, extents, strict=True):
            rows, columns = np.nonzero(mask)
            assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (y1, y2, x1, x2)
        for index, item in enumerate(scene.objects):
            alone = masks(Scene((item,), PLAIN), 96)[0]
            assert shown[index].sum() >= 0.56 * alone.sum()  # 60 % where it is checked, at 64 pixels


def test_pixels_show_the_named_color_and_the_background_never_does():
    bases = np.array([COLOR_RGB[color] for color in COLORS], float)
    for scene in scenes("train", 60):
        picture, owners = render(scene).astype(float), masks(scene)
        for item, mask in zip(scene.objects, owners, strict=True):
            nearest = np.linalg.norm(picture[mask][:, None] - bases, axis=-1).argmin(axis=-1)
            assert (nearest == COLORS.index(item.color)).mean() > 0.8
        bare = render(replace(scene, objects=())).astype(float)
        assert np.linalg.norm(bare[..., None, :] - bases, axis=-1).min() > 60


@given(st.integers(0, 10**6), st.sampled_from([32, 57, 128, 200]))
@settings(max_examples=25, deadline=None)
def test_geometry_does_not_depend_on_the_pixel_size(index, size):
    scene = sample_scene("train", index)
    picture = render(scene, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    for fine, coarse in zip(boxes(scene, 400) / 400, boxes(scene, size) / size, strict=True):
        np.testing.assert_allclose(fine, coarse, atol=2.5 / size)


def test_a_picture_needs_pixels():
    for draw in (render, masks, boxes):
        with pytest.raises(ValueError, match="size of 1 or more"):
            draw(sample_scene("train", 0), 0)


# --- edits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_edits_change_only_their_target(split):
    kinds = Counter()
    for index, scene in enumerate(scenes(split, 120)):
        change = edit(scene, rng(index))
        kinds[change.kind] += 1
        assert change.before == scene and split_of(change.after) == split
        others = [o for i, o in enumerate(scene.objects) if i != change.target]
        after = list(change.after.objects)
        old = scene.objects[change.target]
        if change.kind != "remove":
            new = after.pop(change.target)
            free = {"recolor": ("color", "rgb"), "replace": ("shape",)}[change.kind]
            assert replace(new, **{name: getattr(old, name) for name in free}) == old != new
            assert {"recolor": new.color, "replace": new.shape}[change.kind] in change.instruction
        assert after == others and change.after.objects
        assert change.after.background == scene.background
        if split == "train":
            assert not any(o.pair in HELD_OUT_PAIRS for o in change.after.objects)
        changed = (render(scene) != render(change.after)).any(axis=-1)
        assert changed.any()
        involved = [old] if change.kind == "remove" else [old, new]
        region = np.any([masks(Scene((item,), PLAIN))[0] for item in involved], axis=0)
        # Beyond the masks lie the soft edge and, on pointed shapes, tips too thin to own a pixel center.
        reach = 2 if {"star", "triangle"} & {item.shape for item in involved} else 1
        assert not (changed & ~grown(region, reach)).any()
    assert set(kinds) == set(EDIT_KINDS)


def test_an_edit_needs_something_to_name():
    with pytest.raises(ValueError, match="use a scene of sample_scene"):
        edit(Scene((), PLAIN), rng())
