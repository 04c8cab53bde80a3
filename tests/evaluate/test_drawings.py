"""Drawn pictures and their judge: hand-made answers, and a whole small random GILL at the command line."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy_gill
from calls_for_tests import Call
from PIL import Image
from toy_gill import MICRO, ByHand, psnr

import mllm_edge
from mllm_edge.bundle.read import read_manifest
from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.evaluate.cases import Truth
from mllm_edge.evaluate.drawings import Judge, asking, drawings, drawn, read_judge
from mllm_edge.evaluate.lookups import recalls
from mllm_edge.evaluate.scores import Prediction, score
from mllm_edge.export.export import export
from mllm_edge.recipes.data.gill_scenes import few_things, told_apart
from mllm_edge.recipes.parts import save_part
from mllm_edge.recipes.tasks.scene_classifier import SceneClassifier
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.turn import Drawing
from mllm_edge.scenes import render, sample_scene

DIMS = replace(MICRO, language=replace(MICRO.language, context=256))


def names(index: int) -> list[str]:
    return [" ".join(thing.pair) for thing in few_things("test", index, 0).objects]


def test_scores_of_drawings_are_shares_of_objects_and_of_pictures() -> None:
    scenes = [few_things("test", index, 0) for index in range(40)]
    two, one = (next(s for s in scenes if len({t.pair for t in s.objects}) == len(s.objects) == n) for n in (2, 1))
    pair, (single,) = [" ".join(t.pair) for t in two.objects], [" ".join(t.pair) for t in one.objects]
    other = "red circle" if single != "red circle" else "blue square"
    found = score(
        "drawings",
        [
            (Truth(seen=pair, scene=two), Prediction("", [], pair)),  # both, and nothing else
            (Truth(seen=pair[:1], scene=two), Prediction("", [], pair[:1], free=False)),  # one of two
            (Truth(seen=[single], scene=one), Prediction("", [], [single, other])),  # one more than asked
            (Truth(seen=[single], scene=one), Prediction("", [], [])),
        ],
    )
    assert found == {
        "drawn_objects": pytest.approx(100 * 4 / 6, abs=0.01),
        "drawn_pictures": 25.0,
        "drawn_freely": 75.0,
        "judge_objects": pytest.approx(100 * 5 / 6, abs=0.01),
        "judge_pictures": 75.0,
    }


class Painter:
    """Draws the scene that case `seed` asks for; the odd ones only when it is forced to."""

    def __init__(self, bundle: Path):
        self.manifest = read_manifest(bundle)

    def generate(self, words: str, drawing: Drawing, teacher_forced: str | None = None, **_: Any) -> Any:
        assert words == asking(few_things("test", drawing.seed, 0), drawing.seed) and words.startswith("Draw ")
        assert teacher_forced in (None, "".join(f"[IMG{number}]" for number in range(8)))
        if drawing.seed % 2 and teacher_forced is None:
            return SimpleNamespace(images=[])
        picture = Image.fromarray(render(few_things("test", drawing.seed, 0), 96))
        return SimpleNamespace(images=[Picture((0, 0), words, "generated", picture)])


class Oracle(Judge):
    """Knows the first scenes of the test split, drawn at any size."""

    def names(self, picture: Image.Image) -> list[str]:
        shown = [np.asarray(Image.fromarray(render(few_things("test", i, 0), 64)), float) for i in range(6)]
        seen = np.asarray(picture.resize((64, 64)), float)
        return names(int(np.argmin([np.abs(one - seen).mean() for one in shown])))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_gill.checkpoint(tmp_path_factory.mktemp("gill") / "checkpoint", DIMS)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("llama_cpp")
    out = tmp_path_factory.mktemp("bundle") / "gill.bundle"
    return export("gill", str(checkpoint), quant="f32", out=out, drawing=Drawing(steps=2))


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("judge")
    save_part(folder, "scene_classifier", {}, SceneClassifier().state_dict(), "", "float32")
    return folder


def test_each_scene_is_asked_for_and_forced_where_nothing_comes(bundle: Path) -> None:
    data = drawings(6, "test", Oracle(None, ""))  # type: ignore[arg-type]
    painter: Any = Painter(bundle)
    pairs = []
    for index, case in enumerate(data.cases):
        assert case.ask is not None
        kept = case.ask(painter)
        assert kept == {"found": names(index), "free": index % 2 == 0}
        pairs.append((case.truth(case.open()), Prediction("", [], kept["found"], free=kept["free"])))
    expected = dict.fromkeys(("drawn_objects", "drawn_pictures", "judge_objects", "judge_pictures"), 100.0)
    assert score("drawings", pairs) == {**expected, "drawn_freely": 50.0}


def test_the_judge_sees_what_recipes_show_it(judge: Path) -> None:
    from mllm_edge.recipes.data.small_scenes import small_pixels

    read, scene = read_judge(judge), sample_scene("held_out", 3)
    (found,) = read.model.pairs(torch.from_numpy(small_pixels(scene, 64))[None])
    assert read.names(Image.fromarray(render(scene, 64))) == sorted(" ".join(pair) for pair in found) != []


def test_the_judge_that_ships_knows_scenes() -> None:
    read = read_judge(None)
    told = [sorted(set(names(index))) for index in range(60)]
    found = [read.names(Image.fromarray(render(few_things("test", index, 0), 64))) for index in range(60)]
    assert np.mean([one == other for one, other in zip(told, found)]) > 0.9


def test_a_missing_judge_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"scene_classifier.safetensors is missing; train that part first"):
        read_judge(tmp_path)


def test_a_forced_picture_is_that_of_words_and_picture_tokens(bundle: Path, checkpoint: Path) -> None:
    hand, words = ByHand(toy_gill.state(DIMS), DIMS), asking(few_things("test", 0, 0), 0)
    ids = [2, *checkpoint_tokenizer(checkpoint)(words)]
    line = checkpoint_tokenizer(checkpoint)("\n")
    _, states = hand.answer([hand.embeds(ids)], 15, line)
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        picture, free = drawn(model, words, 5)
        retrieve, generate = model.decided(words).values()
    group = list(range(DIMS.start, DIMS.start + 8))
    rows = hand.lm(inputs_embeds=hand.embeds([*ids, *group]), output_hidden_states=True).hidden_states[-1][0, -8:]
    text, _, chances = hand.heads(rows.detach())
    assert [retrieve, generate] == pytest.approx(chances, abs=1e-3)
    assert free == (len(states) >= 8)
    if free:
        text = hand.heads(states[:8])[0]
    assert psnr(np.asarray(picture), hand.drawn(text, np.random.default_rng(5))) >= 40


def test_drawings_at_the_command_line(bundle: Path, judge: Path, tmp_path: Path, call: Call) -> None:
    out, words = tmp_path / "answers.jsonl", ["eval", bundle, "scenes-drawings", "-n", 3, "--threads", 1]
    whole = call(*words, "--judge", judge, "-o", out, "--json")
    assert whole.code == 0, whole.err
    title, *lines = map(json.loads, out.read_text().splitlines())
    assert [line["case"] for line in lines] == ["test 0", "test 1", "test 2"]
    asked, found = [names(index) for index in range(3)], [line["found"] for line in lines]
    hits = [name in there for there, wanted in zip(found, asked) for name in wanted]
    scores = whole.document["scores"]
    assert scores["drawn_objects"] == pytest.approx(100 * np.mean(hits), abs=0.01)
    assert scores["drawn_freely"] == pytest.approx(100 * np.mean([line["free"] for line in lines]), abs=0.01)
    assert whole.document["cases"] == 3 and whole.document["dataset"] == "scenes-drawings (test)"

    out.write_text("\n".join(map(json.dumps, [title, *lines[:2]])) + "\n")  # as if it was cut off
    again = call(*words, "--judge", judge, "-o", out, "--resume", "--json")
    assert again.document == whole.document
    assert "objects with the asked color and shape" in call(*words, "--judge", judge, "-o", out, "--resume").out

    torch.manual_seed(1)
    save_part(tmp_path, "scene_classifier", {}, SceneClassifier().state_dict(), "", "float32")
    other = call(*words, "--judge", tmp_path, "-o", out, "--resume")
    assert other.code == 2 and "another bundle or data set" in other.error


def test_lookups_at_the_command_line(bundle: Path, checkpoint: Path, call: Call) -> None:
    hand, words = ByHand(toy_gill.state(DIMS), DIMS), checkpoint_tokenizer(checkpoint)
    group, texts, images = list(range(DIMS.start, DIMS.start + 8)), [], []
    for scene, text in told_apart("held_out", 7, 0):
        rows = hand.embeds([2, *words(text), *group])
        states = hand.lm(inputs_embeds=rows, output_hidden_states=True).hidden_states[-1][0, -8:]
        texts.append(hand.heads(states.detach())[1].numpy())
        images.append(hand.seen(Image.fromarray(render(scene, 320)))[1][0].numpy())
    said = call(*("eval", bundle, "scenes-retrieval", "-n", 7, "--split", "held_out", "--threads", 1, "--json"))
    assert said.code == 0, said.err
    expected = {key: round(100 * share, 2) for key, share in recalls(np.stack(texts), np.stack(images)).items()}
    assert said.document["scores"] == expected and said.document["cases"] == 7
    said = call("eval", bundle, "scenes-decisions", "-n", 4, "--threads", 1)
    assert said.code == 0 and "decisions, macro F1" in said.out


def test_what_these_sets_do_not_take_is_named(
    bundle: Path, folder: Path, judge: Path, tmp_path: Path, call: Call
) -> None:
    for words, line in (
        ((bundle, "scenes-retrieval", "-o", tmp_path / "a.jsonl"), "generates no answers; leave out --out"),
        ((bundle, "scenes-decisions", "--teacher-forced"), "leave out --teacher-forced"),
        ((bundle, "scenes-retrieval", "--judge", judge), "--judge goes with scenes-drawings; leave it out"),
        ((bundle, "scenes-retrieval", "-n", 501), "1 to 500 scenes"),
        ((bundle, "scenes-drawings", "--judge", tmp_path), "scene_classifier.safetensors is missing"),
        ((folder, "scenes-drawings", "--judge", judge), "draws no pictures"),
        ((folder, "scenes-retrieval"), "retrieves no pictures"),
        ((folder, "scenes-decisions"), "retrieves no pictures"),
    ):
        said = call("eval", *words)
        assert said.code == 2 and line in said.error, (words, said.err)
