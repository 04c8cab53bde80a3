"""When tensors are made: anew for each state, once for each picture, question and box, and no longer than they may be
kept. Stages are fakes that count their calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROMPT
from PIL import Image

from mllm_edge.bundle.manifest import Manifest, Slot, StageEntry, TensorSpec
from mllm_edge.bundle.read import read_manifest
from mllm_edge.bundle.sources import Boxes, Pixels, Source, States, Task, Text
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.lazy import LazyStage
from mllm_edge.runtime.sources import Held
from mllm_edge.runtime.tensors import Tensors
from mllm_edge.runtime.turn import InputPicture, Turn

WIDTH = 4


class Letters:
    bos, eos = None, None

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


def pixels(name: str) -> Pixels:
    return Pixels(name, 2, "squash", "bilinear", [0, 0, 0], [0.0] * 3, [1 / 255] * 3)


SOURCES: list[Source] = [
    pixels("picture"),
    pixels("mask_picture"),
    Boxes("boxes"),
    Text("question", "words", 2),
    Task("task", {"chat": 0, "rec": 1}),
    States("seg", ["[SEG]"]),
]
GRAPH = {
    "encoder": ("picture", "features levels"),
    "connector": ("features", "image_embeds"),
    "query": ("features question task", "query_embeds"),
    "region": ("levels boxes", "region_embeds"),
    "mask_encoder": ("mask_picture", "embedding"),
    "mask_decoder": ("embedding seg", "mask_logits"),
    "unet": ("embedding latent", "noise"),
}
SLOTS = [
    Slot("<image>", "pixels", ["image_embeds"], joint="<image>"),
    Slot("<both>", "pixels", ["query_embeds", "image_embeds"]),
    Slot("<bbox>", "boxes", ["region_embeds"]),
]


def spec(name: str) -> TensorSpec:
    return TensorSpec(name, "float32", ["n", WIDTH])


def entry(name: str, takes: str, gives: str) -> StageEntry:
    inputs, outputs = ([spec(one) for one in names.split()] for names in (takes, gives))
    return StageEntry("file", 0, "", name, "onnx", "fp32", inputs, outputs)


@dataclass
class Fakes:
    """Stages that sum the means of what they read, each output one more, and count their calls."""

    manifest: Manifest
    folder: Path = Path()
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        stages = {one.name: LazyStage(one, lambda one=one: _Fake(one, self.calls)) for one in self.manifest.stages}
        self.tensors = Tensors(self.manifest, stages, Held(self.folder, {"words": Letters()}))  # type: ignore[dict-item]

    def runs(self, *names: str) -> list[int]:
        return [self.calls[name] for name in names]


class _Fake:
    def __init__(self, one: StageEntry, calls: Counter[str]):
        self.spec, self.calls = one, calls

    def __call__(self, **arrays: Any) -> dict[str, Any]:
        assert list(arrays) == [wanted.name for wanted in self.spec.inputs]
        self.calls[self.spec.name] += 1
        rows = [np.mean(array, axis=-1 if name in ("boxes", "seg") else None) for name, array in arrays.items()]
        total = np.atleast_1d(sum(rows))[:, None]  # [n,1], where there are n boxes or states
        outputs = enumerate(self.spec.outputs)
        return {one.name: np.repeat(total + n, WIDTH, axis=1).astype(np.float32) for n, one in outputs}

    def close(self) -> None:
        pass


@pytest.fixture
def manifest(tiny_bundle: Path) -> Manifest:
    stages = [entry(name, *wires) for name, wires in GRAPH.items()]
    return replace(
        read_manifest(tiny_bundle), sources=SOURCES, stages=stages, prompt=replace(PROMPT, slots=SLOTS), answers=[]
    )


@pytest.fixture
def fakes(manifest: Manifest) -> Iterator[Fakes]:
    made = Fakes(manifest)
    yield made
    made.tensors.close()


def picture(gray: int) -> InputPicture:
    return InputPicture(f"gray {gray}", Image.new("RGB", (4, 4), (gray, gray, gray)))


def turn(gray: int = 1, question: str = "ab", **known: Any) -> Turn:
    return Turn(question, picture(gray), Letters(), **known)  # type: ignore[arg-type]


def states(value: float) -> dict[str, list[Any]]:
    return {"seg": [np.full(WIDTH, value, np.float32)]}


def test_values_are_those_of_the_stages_one_after_the_other(fakes: Fakes) -> None:
    assert fakes.tensors.need(turn(10), "image_embeds").tolist() == [[10.0] * WIDTH]
    boxes = [(0, 0, 4, 4), (2, 2, 4, 4)]  # of a picture of 4 x 4: means 1/2 and 3/4
    region = fakes.tensors.need(turn(10, boxes=boxes), "region_embeds")
    assert region.tolist() == [[11.5] * WIDTH, [11.75] * WIDTH]


def test_what_depends_on_states_is_made_anew(fakes: Fakes) -> None:
    asked = turn(states=states(1))
    first = fakes.tensors.need(asked, "mask_logits")
    again = fakes.tensors.need(asked, "mask_logits")
    asked.states = states(2)
    other = fakes.tensors.need(asked, "mask_logits")
    assert fakes.runs("mask_decoder", "mask_encoder") == [3, 1]
    assert np.array_equal(first, again) and (other - first == 1).all()


def test_what_depends_on_the_picture_is_made_once_for_it(fakes: Fakes) -> None:
    for gray, question in ((1, "ab"), (1, "cd"), (2, "ab"), (1, "ef")):
        found = fakes.tensors.need(turn(gray, question), "image_embeds")
        assert (found == gray).all()
    assert fakes.runs("encoder", "connector") == [2, 2]


def test_what_depends_on_the_question_is_made_once_for_it(fakes: Fakes) -> None:
    asked = [(1, "ab", ""), (1, "ab", ""), (1, "cd", ""), (1, "ab", "rec"), (2, "ab", ""), (1, "ab", "")]
    wanted = [97.5 + 1, 97.5 + 1, 99.5 + 1, 97.5 + 1 + 1, 97.5 + 2, 97.5 + 1]  # letters, gray level, task
    for (gray, question, task), value in zip(asked, wanted, strict=True):
        assert (fakes.tensors.need(turn(gray, question, task=task), "query_embeds") == value).all()
    assert fakes.runs("query", "encoder", "connector") == [4, 2, 0]  # nothing that no one asked for


def test_the_same_box_is_read_once_for_its_picture(fakes: Fakes) -> None:
    for gray, boxes in ((1, [(0, 0, 2, 2)]), (1, [(0, 0, 2, 2)]), (1, [(0, 0, 4, 4)]), (2, [(0, 0, 2, 2)])):
        fakes.tensors.need(turn(gray, boxes=boxes), "region_embeds")
    assert fakes.runs("region", "encoder") == [3, 2]


def test_time_is_that_of_the_turn_that_made_it(fakes: Fakes) -> None:
    first, second = turn(), turn()
    for asked in (first, second):
        fakes.tensors.need(asked, "image_embeds")
    assert first.timings.keys() == {"preprocess", "encoder", "connector"}
    assert second.timings == {}


def test_what_was_not_used_for_longest_goes_first(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 4 * WIDTH * 4  # bytes: of a picture three rows are kept, its embeddings and what others are made of
    monkeypatch.setattr("mllm_edge.runtime.tensors.CACHE_BYTES", most)
    for gray in (1, 2, 1, 3, 1, 2):  # 3 drives 2 out, not 1, which was used later
        fakes.tensors.need(turn(gray), "image_embeds")
        assert sum(array.nbytes for array in fakes.tensors._cache.values()) <= most
    assert fakes.runs("encoder") == [4]


def test_what_a_turn_uses_stays_however_large_it_is(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mllm_edge.runtime.tensors.CACHE_BYTES", 0)
    for _ in range(3):
        fakes.tensors.need(turn(1), "image_embeds")
    assert fakes.runs("encoder") == [1]
    fakes.tensors.need(turn(2), "image_embeds")
    fakes.tensors.need(turn(1), "image_embeds")
    assert fakes.runs("encoder") == [3]


def test_a_value_in_place_of_another_reaches_what_is_made_of_it_and_nothing_else(fakes: Fakes) -> None:
    plain, changed = turn(), turn(values={"features": np.full((1, WIDTH), 7, np.float32)})
    for _ in range(2):
        assert (fakes.tensors.need(changed, "image_embeds") == 7).all()
        assert (fakes.tensors.need(plain, "image_embeds") == 1).all()
    assert (fakes.tensors.need(changed, "features") == 7).all()


def test_a_loop_gives_its_own_tensor_and_keeps_what_stays_the_same(fakes: Fakes) -> None:
    asked = turn()
    with pytest.raises(BadInput, match="latent is made in the course of an answer"):
        fakes.tensors.need(asked, "noise")
    for value in (1, 2):
        asked.values["latent"] = np.full((1, WIDTH), value, np.float32)
        assert (fakes.tensors.need(asked, "noise") == 1 + value).all()
    assert fakes.runs("unet", "mask_encoder") == [2, 1]


def test_what_does_not_depend_on_states_is_made_ahead(fakes: Fakes) -> None:
    asked = turn(states=states(1))
    fakes.tensors.ahead(asked, ["mask_logits"])
    fakes.tensors.close()
    assert fakes.runs("mask_encoder", "mask_decoder") == [1, 0]
    fakes.tensors.need(asked, "mask_logits")
    assert fakes.runs("mask_encoder", "mask_decoder", "encoder") == [1, 1, 0]


def test_what_is_missing_is_said(fakes: Fakes) -> None:
    with pytest.raises(BadInput, match="give no nothing"):
        fakes.tensors.need(turn(), "nothing")
    with pytest.raises(BadInput, match=r"has no \[SEG\]"):
        fakes.tensors.need(turn(), "mask_logits")
    with pytest.raises(BadInput, match="needs a picture"):
        fakes.tensors.need(Turn("ab", None, Letters()), "image_embeds")  # type: ignore[arg-type]


def test_rows_of_a_slot(fakes: Fakes) -> None:
    one, both, region = SLOTS
    asked = turn(boxes=[(0, 0, 4, 4), (0, 0, 2, 4)])
    pictures = [picture(1), picture(2), picture(1)]
    rows = fakes.tensors.rows(one, asked, pictures)
    assert [row.embeds.tolist() for row in rows] == [[[1.0] * WIDTH], [[2.0] * WIDTH], [[1.0] * WIDTH]]
    assert rows[0].key == rows[2].key != rows[1].key
    assert {row.of for row in rows} == {"pixels"}
    (two,) = fakes.tensors.rows(both, asked, [picture(2)])
    assert two.embeds.tolist() == [[2 + 97.5] * WIDTH, [2.0] * WIDTH]  # one tensor after the other
    (again,) = fakes.tensors.rows(both, turn(2, "cd"), [picture(2)])
    assert len({two.key, again.key, rows[1].key}) == 3  # another question, other rows
    boxes = fakes.tensors.rows(region, asked, pictures)
    assert [row.embeds.tolist() for row in boxes] == [[[2.5] * WIDTH], [[2.375] * WIDTH]]
    assert boxes[0].key != boxes[1].key
    assert fakes.tensors.rows(region, turn(), pictures) == []
    (pair, _) = fakes.tensors.rows(replace(region, tensors=["region_embeds"] * 2), asked, pictures)
    assert pair.embeds.tolist() == [[2.5] * WIDTH] * 2


LEVELS = 40


def test_each_stage_of_a_deep_graph_of_diamonds_runs_once(manifest: Manifest) -> None:
    """Two ways lead from each level to the next: 2^40 in all."""
    stages = [entry("first", "seg", "x0")]
    for level in range(LEVELS):
        for side in ("left", "right"):
            stages.append(entry(f"{side} {level}", f"x{level}", f"{side}{level}"))
        stages.append(entry(f"join {level}", f"left{level} right{level}", f"x{level + 1}"))
    deep = Fakes(replace(manifest, stages=stages, prompt=PROMPT))
    value = deep.tensors.need(turn(states=states(1)), f"x{LEVELS}")
    assert (value == np.float32(2) ** LEVELS).all()
    assert deep.calls == Counter({one.name: 1 for one in stages})
    deep.tensors.close()
