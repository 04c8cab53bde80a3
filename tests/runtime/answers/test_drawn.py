"""Generated pictures over stages that are plain functions: branches in one batch or one by one, seeds, progress."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mllm_edge.bundle.answers import PicturesAnswer
from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.answers.pictures import pictures
from mllm_edge.runtime.turn import Drawing, Ranking, Turn

SIDE, STEPS = 4, 3
# Two conditions, as an editor has them, a map that is one for all branches, and a text that an encoder makes of words.
ENTRY = PicturesAnswer(
    states="",
    unet="unet",
    vae="vae",
    latent="latent",
    timestep="timestep",
    noise="noise",
    decoded="decoded",
    pixels="pixels",
    latent_scale=0.5,
    shape=[1, 3, SIDE, SIDE],
    betas=[0.00085, 0.012],
    train_steps=1000,
    drops=[["words", "no_words"], ["seen", "nothing"]],
    guidance=[7.5, 1.5],
    schedule="euler_ancestral",
    steps=STEPS,
)
GIVEN = {
    "words": np.full((1, 2), 2.0, np.float32),
    "no_words": np.zeros((1, 2), np.float32),
    "seen": np.full((1, 3, SIDE, SIDE), 0.5, np.float32),
    "nothing": np.zeros((1, 3, SIDE, SIDE), np.float32),
    "map": np.full((1, 3, SIDE, SIDE), 0.25, np.float32),
    "query": np.array([[3.0, 4.0]], np.float32),
}
Arrays = Mapping[str, np.ndarray]


def unet(given: Arrays) -> np.ndarray:
    told = given["text"].mean(axis=1)[:, None, None, None]
    return np.tanh(given["latent"] + told * given["seen"] + given["map"] + given["timestep"] / 1000).astype(np.float32)


STAGES: dict[str, tuple[list[str], str, Callable[[Arrays], np.ndarray]]] = {
    "encoder": (["words"], "text", lambda given: given["words"] + 1),
    "unet": (["latent", "timestep", "text", "seen", "map"], "noise", unet),
    "vae": (["decoded"], "pixels", lambda given: np.tanh(given["decoded"])),
}


def drawn(
    axis: Any, drawing: Drawing, entry: PicturesAnswer = ENTRY, alike: str = "map"
) -> tuple[Image.Image, list[int]]:
    """The picture, and how many branches each call of the UNet had; inputs in `alike` are one for all."""
    (picture,), calls = all_drawn(axis, drawing, entry, alike)
    assert (picture.origin, picture.span) == ("generated", (0, 0))
    return picture.image, calls


def all_drawn(
    axis: Any,
    drawing: Drawing,
    entry: PicturesAnswer = ENTRY,
    alike: str = "map",
    embed: Callable[[Image.Image], np.ndarray] | None = None,
) -> tuple[list[Picture], list[int]]:
    """See `drawn`; `embed` is what compares pictures with the query."""
    shapes = {"latent": entry.shape, "timestep": [1], "text": [1, 2]}
    rows = {name: shapes.get(name, [1, 3, SIDE, SIDE]) for name in STAGES["unet"][0]}
    specs = [
        TensorSpec(name, "float32", shape if name in ("timestep", *alike.split()) else [axis, *shape[1:]])
        for name, shape in rows.items()
    ]
    turn, calls = Turn("", None, None, drawing=drawing, inputs={"unet": specs}), []  # type: ignore[arg-type,var-annotated]
    turn.ranking = Ranking(entry.states, "query", embed) if embed else None

    def need(name: str) -> np.ndarray:
        if name in turn.values:
            return turn.values[name]
        if name in GIVEN:
            return GIVEN[name]
        inputs, _, run = next(stage for stage in STAGES.values() if stage[1] == name)
        given = {name: need(name) for name in inputs}
        if name == "noise":
            calls.append(len(given["latent"]))
            assert len(given["text"]) == len(given["seen"]) == calls[-1]
        return run(given)

    found = list(pictures(turn, entry, need))
    assert turn.values == {}
    return found, calls


def expected(seed: int) -> np.ndarray:
    """By hand: three branches, Euler ancestral at 999, 499.5 and 0."""
    random = np.random.default_rng(seed)
    kept = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    sigmas = np.append(np.interp([999, 499.5, 0], np.arange(1000), np.sqrt((1 - kept) / kept)), 0)
    latent = random.standard_normal((1, 3, SIDE, SIDE), np.float32) * sigmas[0]
    for timestep, here, after in zip([999, 499.5, 0], sigmas, sigmas[1:]):
        read = {"latent": latent / np.sqrt(here**2 + 1), "map": GIVEN["map"], "timestep": timestep}
        full, wordless, none = (
            unet({**read, "text": GIVEN[words] + 1, "seen": GIVEN[seen]})
            for words, seen in (("words", "seen"), ("no_words", "seen"), ("no_words", "nothing"))
        )
        noise = none + 1.5 * (wordless - none) + 7.5 * (full - wordless)
        up = np.sqrt(after**2 * (here**2 - after**2) / here**2)
        latent = latent + (np.sqrt(after**2 - up**2) - here) * noise
        latent = latent + (up * random.standard_normal(latent.shape, np.float32) if up else 0)
    pixels = np.tanh(latent / 0.5)[0]
    return np.clip((pixels / 2 + 0.5) * 255, 0, 255).round().astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize(("axis", "calls"), [("branches", [3] * STEPS), (1, [1] * 3 * STEPS)])
def test_branches_are_one_batch_where_the_stage_takes_one(axis: Any, calls: list[int]) -> None:
    image, seen = drawn(axis, Drawing(seed=5))
    assert seen == calls
    assert np.abs(np.asarray(image, int) - expected(5).astype(int)).max() <= 1


def test_a_condition_that_differs_between_branches_needs_their_axis() -> None:
    with pytest.raises(BadInput, match="unet reads one text for all branches, which differ in it; export the bundle"):
        drawn("branches", Drawing(), alike="map text")


def test_the_same_seed_gives_the_same_picture_and_another_another() -> None:
    first, again, other = (np.asarray(drawn("branches", Drawing(seed=seed))[0]) for seed in (2**64 - 1, 2**64 - 1, 0))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_noise_is_the_same_on_every_machine() -> None:
    """numpy's PCG64 and its ziggurat; a change of these numbers changes everybody's pictures."""
    found = np.random.Generator(np.random.PCG64(7)).standard_normal(4, np.float32)
    np.testing.assert_array_equal(found, NOISE)


NOISE = np.array([1.52196932, -1.14410579, 1.15016162, -1.78465319], np.float32)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"steps": 0}, "0 steps draw nothing; give 1 to 1000"),
        ({"steps": 10**9}, "1000000000 steps draw nothing; give 1 to 1000"),
        ({"seed": -1}, "the seed -1 is outside 64 bits; give 0 to 18446744073709551615"),
        ({"seed": 2**64}, "the seed 18446744073709551616 is outside 64 bits"),
        ({"guidance": [7.5]}, r"1 guidance scale\(s\) for 2 condition"),
        ({"guidance": [7.5, float("inf")]}, r"guidance scales \[7.5, inf\] are not all numbers"),
        ({"schedule": "heun"}, "unknown schedule 'heun'"),
        ({"preview": print}, "there is no preview every 0 steps; give 1 or more"),
        ({"count": 0}, "0 pictures cannot be drawn for one; give 1 to 64"),
        ({"count": 65}, "65 pictures cannot be drawn for one; give 1 to 64"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        drawn(1, Drawing(**wish))


def test_progress_and_previews() -> None:
    told: list[tuple[Any, ...]] = []
    shown: list[Image.Image] = []
    report = lambda *given: told.append(given)  # noqa: E731
    entry = replace(ENTRY, schedule="ddim")
    plain, _ = drawn("branches", Drawing(steps=5), entry)
    image, _ = drawn("branches", Drawing(steps=5, report=report, preview=shown.append, every=2), entry)
    assert np.array_equal(plain, image)  # looking changes nothing
    name = "drawing picture 1"
    assert told[:-1] == [(name, 1, 1, None), *((name, 1, 1, None, part / 5) for part in (1, 2, 3, 4))]
    assert told[-1][:3] == (name, 1, 1) and told[-1][3] > 0
    assert [picture.size for picture in shown] == [(SIDE, SIDE)] * 2  # after steps 2 and 4
    off = [np.abs(np.asarray(picture, int) - np.asarray(image, int)).mean() for picture in shown]
    assert off[1] <= off[0]


def test_several_come_in_the_order_of_their_cosines_with_the_query() -> None:
    """The query is (3, 4); a vector of any length counts by its direction, and one without as 0."""
    directions = iter([[10.0, 0.0], [0.0, 0.5], [0.0, 0.0], [-1.0, 0.0], [np.inf, 1.0]])
    seen: list[Image.Image] = []

    def embed(image: Image.Image) -> np.ndarray:
        seen.append(image)
        return np.array(next(directions), np.float32)

    found, _ = all_drawn(1, Drawing(seed=5, count=5), embed=embed)
    assert [part.image for part in found] == [seen[at] for at in (1, 0, 2, 4, 3)]
    assert [part.score for part in found] == pytest.approx([0.8, 0.6, 0, 0, -0.6])
    assert np.abs(np.asarray(seen[0], int) - expected(5).astype(int)).max() <= 1  # the first is what one alone would be


def test_several_that_cannot_be_compared_stand_as_they_were_drawn() -> None:
    with pytest.warns(RuntimeWarning, match="cannot compare pictures"):
        found, _ = all_drawn(1, Drawing(seed=5, count=2))
    assert [part.score for part in found] == [None, None]
    assert np.abs(np.asarray(found[0].image, int) - expected(5).astype(int)).max() <= 1


def test_a_spacing_goes_with_its_schedule() -> None:
    """Another schedule than the bundle's has its own usual spacing."""
    usual = drawn(1, Drawing(schedule="pndm"))[0]
    assert np.array_equal(usual, drawn(1, Drawing(), replace(ENTRY, schedule="pndm", spacing="leading"))[0])
    assert np.array_equal(usual, drawn(1, Drawing(schedule="pndm"), replace(ENTRY, spacing="leading"))[0])
    assert not np.array_equal(usual, drawn(1, Drawing(), replace(ENTRY, schedule="pndm", spacing="linspace"))[0])
