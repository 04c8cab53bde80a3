"""What follows from the wiring alone, on a small graph that was wired by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from conftest import PROMPT

from mllm_edge.bundle.answers import BoxesAnswer, MasksAnswer, PicturesAnswer, RetrievedAnswer
from mllm_edge.bundle.manifest import Prompt, Slot, TensorSpec
from mllm_edge.bundle.sources import Boxes, Constant, FileEntry, Labels, Pixels, Source, States, Task, Text
from mllm_edge.runtime.wiring import (
    LOOP,
    answer_tensors,
    dependencies,
    makers,
    needed_for,
    prompt_tensors,
    ready_ahead,
)


class Wire:
    """A stage as far as wiring sees it. Counts how often it is looked at."""

    looks = 0

    def __init__(self, name: str, takes: str, gives: str):
        self.name, self._takes, self._gives = name, specs(takes), specs(gives)

    @property
    def inputs(self) -> list[TensorSpec]:
        Wire.looks += 1
        assert Wire.looks < 10_000, "the graph is walked again and again"
        return self._takes

    @property
    def outputs(self) -> list[TensorSpec]:
        return self._gives


def specs(names: str) -> list[TensorSpec]:
    return [TensorSpec(name, "float32", [1]) for name in names.split()]


@pytest.fixture(autouse=True)
def _unseen() -> None:
    Wire.looks = 0


def pixels(name: str) -> Pixels:
    return Pixels(name, 8, "squash", "bilinear", [0, 0, 0], [0.5] * 3, [0.5] * 3)


SOURCES: list[Source] = [
    pixels("picture"),
    pixels("wide_picture"),
    Boxes("boxes"),
    Text("question", "words", 8),
    Task("task", {"chat": 0}),
    Constant("table", FileEntry("table.npy", 0, "")),
    States("seg", ["[SEG]"]),
    Labels("tags", "tag_scores", ["cat"], [0.5]),
]
STAGES = [
    Wire("encoder", "picture", "features levels"),
    Wire("connector", "features", "image_embeds"),
    Wire("tagger", "features", "tag_scores"),
    Wire("query", "features question task", "query_embeds"),
    Wire("region", "levels boxes", "region_embeds"),
    Wire("wide", "wide_picture", "embedding"),
    Wire("masks", "embedding seg", "mask_logits"),
    Wire("mapper", "seg table", "condition"),
    Wire("latents", "picture", "image_latents"),
    Wire("unet", "latent timestep condition image_latents", "noise"),
    Wire("vae", "decoded", "drawn"),
]
DEPENDS = dependencies(STAGES, SOURCES)
PICTURES = PicturesAnswer(
    "seg", "unet", "vae", "latent", "timestep", "noise", "decoded", "drawn", 0.18, [1, 4, 8, 8], [0.1, 0.2], 1000
)


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ("picture features levels image_embeds tag_scores image_latents", {"pixels"}),
        ("wide_picture embedding", {"pixels"}),
        ("query_embeds", {"pixels", "text", "task"}),
        ("region_embeds", {"pixels", "boxes"}),
        ("table", {"constant"}),
        ("seg", {"states"}),
        ("mask_logits", {"pixels", "states"}),
        ("condition", {"states", "constant"}),
        ("noise", {LOOP, "states", "constant", "pixels"}),
        ("drawn", {LOOP}),
    ],
)
def test_every_tensor_depends_on_the_sources_that_lead_to_it(names: str, kinds: set[str]) -> None:
    assert {name: DEPENDS[name] for name in names.split()} == dict.fromkeys(names.split(), kinds)


def test_what_no_source_and_no_stage_gives_is_not_known() -> None:
    assert not {"latent", "tags", "nothing"} & DEPENDS.keys()


def test_makers() -> None:
    made = makers(STAGES)
    assert made["levels"].name == made["features"].name == "encoder"
    assert "picture" not in made and "latent" not in made


@pytest.mark.parametrize(
    ("tensors", "stages"),
    [
        (["image_embeds"], {"encoder", "connector"}),
        (["region_embeds", "image_embeds"], {"encoder", "connector", "region"}),
        (["mask_logits"], {"wide", "masks"}),
        (["noise"], {"mapper", "latents", "unet"}),
        (["picture", "nothing"], set()),
        ([], set()),
    ],
)
def test_stages_that_tensors_are_made_by(tensors: Sequence[str], stages: set[str]) -> None:
    assert needed_for(tensors, STAGES) == stages


@pytest.mark.parametrize(
    ("tensors", "ahead"),
    [
        (["mask_logits"], {"embedding"}),  # the states come with the answer
        (["noise"], {"image_latents"}),
        (["condition"], set()),  # a constant is no stage's
        (["image_embeds"], {"image_embeds"}),  # the whole of it
        (["region_embeds", "mask_logits"], {"region_embeds", "embedding"}),
        (["seg", "picture", "nothing"], set()),
    ],
)
def test_what_can_be_made_before_the_answer_ends(tensors: Sequence[str], ahead: set[str]) -> None:
    found = ready_ahead(tensors, STAGES, DEPENDS)
    assert len(found) == len(set(found)) and set(found) == ahead


@pytest.mark.parametrize(
    ("entry", "tensors", "stages"),
    [
        (MasksAnswer("seg", "mask_logits", 8), ["mask_logits"], {"wide", "masks"}),
        (BoxesAnswer("(.)(.)(.)(.)", 2, 1.0), [], set()),
        (RetrievedAnswer("seg", "condition"), ["condition"], {"mapper"}),
        (RetrievedAnswer("seg", "drawn", decision="mask_logits"), ["drawn", "mask_logits"], {"vae", "masks", "wide"}),
        (PICTURES, ["condition", "image_latents"], {"mapper", "latents"}),
    ],
)
def test_what_an_answer_is_made_of(entry: Any, tensors: list[str], stages: set[str]) -> None:
    assert answer_tensors(entry, STAGES) == tensors
    assert needed_for(tensors, STAGES) == stages


def test_what_a_prompt_is_made_of() -> None:
    slots = [*PROMPT.slots, Slot("<both>", "pixels", ["query_embeds", "table"])]
    prompt = Prompt("p", "", "{text}", "{text}", "{text}", [], slots)
    assert prompt_tensors(prompt, SOURCES) == ["image_embeds", "query_embeds", "table", "tag_scores"]


LEVELS = 40


def test_a_deep_graph_of_diamonds_is_walked_once() -> None:
    """Two ways lead from each level to the next: 2^40 in all."""
    stages = [Wire("first", "seg wide_picture", "x0"), Wire("second", "picture", "y0")]
    for level in range(LEVELS):
        for row in "xy":  # that of x depends on states, that of y does not
            stages += [
                Wire(f"{row} left {level}", f"{row}{level}", f"{row}left{level}"),
                Wire(f"{row} right {level}", f"{row}{level}", f"{row}right{level}"),
                Wire(f"{row} join {level}", f"{row}left{level} {row}right{level}", f"{row}{level + 1}"),
            ]
    stages.append(Wire("last", f"x{LEVELS} y{LEVELS}", "end"))
    depends = dependencies(stages, SOURCES)
    assert depends["end"] == depends[f"x{LEVELS}"] == {"pixels", "states"}
    assert depends[f"y{LEVELS}"] == {"pixels"}
    assert needed_for(["end"], stages) == {stage.name for stage in stages}
    assert ready_ahead(["end"], stages, depends) == [f"y{LEVELS}"]
    assert Wire.looks < 10 * len(stages)
