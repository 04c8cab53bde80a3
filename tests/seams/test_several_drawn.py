"""A toy system that looks for pictures and draws them, several for one, and is asked in parts: all by ONNX Runtime."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import test_generated
import torch
import toy_marks
import toy_retrieval
from calls_for_tests import Call
from PIL import Image
from torch.nn import functional
from toy_marks import first_mark, marked
from toys import PIXELS, noise_picture, register

import mllm_edge
from mllm_edge import index as indexing
from mllm_edge.bundle.answers import RetrievedAnswer
from mllm_edge.errors import BadInput
from mllm_edge.export.export import export
from mllm_edge.models.plan import Checkpoint, ExportPlan
from mllm_edge.runtime.answer import Picture
from mllm_edge.runtime.embedding import Embedder
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.turn import Drawing

QUESTION = "draw a dog"


def plan(checkpoint: Checkpoint) -> ExportPlan:
    drawing, looking = test_generated.plan(checkpoint), toy_retrieval.plan(checkpoint)
    (found,) = looking.answers
    assert isinstance(found, RetrievedAnswer)
    stages = [*drawing.stages, *(stage for stage in looking.stages if stage.name in ("head", "eye"))]
    return replace(drawing, stages=stages, answers=[replace(found, needed=False), *drawing.answers])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return marked(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        register(patch, toy_marks.dims(folder), plan)
        out = tmp_path_factory.mktemp("both") / "toy.bundle"
        return export("toy", str(folder), llm="onnx", quant="fp32", out=out)


@pytest.fixture(scope="module")
def index(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos = toy_retrieval.photographs(tmp_path_factory.mktemp("places") / "photos", 12)
    with Embedder(bundle, threads=1) as embedder:
        return indexing.build(embedder, [photos], photos.with_name("photos.index")).folder


@torch.no_grad()
def nearness(picture: np.ndarray, states: torch.Tensor) -> float:
    """By hand: the cosine of a picture and of what eight states look for."""
    pixels = torch.from_numpy(preprocess(Image.fromarray(picture), PIXELS))
    seen = functional.normalize(toy_retrieval.EYE()(pixels), dim=-1)[0].numpy()
    return float(seen @ toy_retrieval.asked(states))


def drawn(states: torch.Tensor, seed: int, count: int) -> list[tuple[np.ndarray, float]]:
    """By hand: `count` pictures for each eight states out of one stream of noise, the nearest of each first."""
    random, found = np.random.default_rng(seed), []
    for group in states.split(8):
        pictures = [
            test_generated._painted(group, random, test_generated.STEPS, test_generated.SCALE) for _ in range(count)
        ]
        found += sorted(((each, nearness(each, group)) for each in pictures), key=lambda pair: -pair[1])
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_several_are_drawn_for_one_and_the_nearest_comes_first(bundle: Path, folder: Path, seed: int) -> None:
    tokens, states = toy_marks.answer(folder, QUESTION, noise_picture(seed), 40)
    assert len(states) == (16 if seed else 8), "the toy must draw here"
    with mllm_edge.load(bundle, threads=1) as model:
        answer = model.generate(QUESTION, noise_picture(seed), drawing=Drawing(seed=seed, count=3))
    assert answer.tokens.ids == tokens
    wanted = drawn(states, seed, 3)
    assert len(answer.images) == len(wanted) == 3 * len(states) // 8
    for part, (pixels, score) in zip(answer.images, wanted):
        assert np.abs(np.asarray(part.image, int) - pixels.astype(int)).max() <= 1
        assert part.score == pytest.approx(score, abs=1e-2) and part.to_json()["score"] == part.score
    scores = [part.score or 0 for part in answer.images[:3]]
    assert scores == sorted(scores, reverse=True)
    assert len({part.span for part in answer.images}) == len(states) // 8


def test_one_is_drawn_as_ever_and_has_no_score(bundle: Path, folder: Path) -> None:
    _, states = toy_marks.answer(folder, QUESTION, noise_picture(0), 40)
    with mllm_edge.load(bundle, threads=1) as model:
        (part,) = model.generate(QUESTION, noise_picture(0), drawing=Drawing(seed=3)).images
    assert test_generated.equal([part.image], test_generated.painted(states, 3))
    assert part.score is None and "score" not in part.to_json()


def test_a_page_and_a_document_have_question_and_answer_in_order(
    bundle: Path, index: Path, tmp_path: Path, call: Call
) -> None:
    Image.fromarray(noise_picture(0)).save(tmp_path / "noise.png")
    (tmp_path / "parts.json").write_text(json.dumps([{"image": "noise.png"}, QUESTION]))
    words = ["run", bundle, "--prompt-file", tmp_path / "parts.json", "--draw", 2, "--index", index, "--json"]
    page, plain = tmp_path / "answer.html", tmp_path / "out"
    said = call(*words, "-o", page)
    assert said.code == 0 and f"wrote {page}" in said.err
    parts = said.document["parts"]
    shown = [part for part in parts if "image" in part]
    assert [part["origin"] for part in shown] == ["retrieved", "generated", "generated"]
    assert [part["image"] for part in shown] == ["image_0.png", "image_1.png", "image_2.png"]
    assert shown[1]["score"] >= shown[2]["score"] and Path(shown[0]["file"]).is_file()
    assert "".join(part.get("text", "") for part in parts).split() == said.document["text"].split()
    text = page.read_text()
    assert text.count("<img ") == 4 and text.index("<img ") < text.index(QUESTION) < text.index('class="answer"')
    assert call(*words, "-o", plain).document["parts"] == parts
    assert Image.open(plain / "image_2.png").size == (16, 16)
    same = call("run", bundle, QUESTION, "--image", tmp_path / "noise.png", "--draw", 2, "--index", index, "--json")
    assert same.document["parts"] == parts


def test_parts_stand_where_they_are_put(bundle: Path) -> None:
    one, two = noise_picture(0), noise_picture(1)
    with mllm_edge.load(bundle, threads=1) as model:
        given = model.prompt_embeds(["see ", one, " and ", two, " there"])
        np.testing.assert_array_equal(given, model.prompt_embeds("see <image> and <image> there", [one, two]))
        assert not np.array_equal(given, model.prompt_embeds(["see ", two, " and ", one, " there"]))
        np.testing.assert_array_equal(model.prompt_embeds([one, "see"]), model.prompt_embeds("see", one))
        asked = [model.chat(max_tokens=6).ask(question).tokens.ids for question in (["see ", one], "see <image>")[:1]]
        assert asked == [model.generate(["see ", one], max_tokens=6).tokens.ids]


def test_no_picture_before_so_many_tokens_and_a_scale_that_brings_one(
    bundle: Path, folder: Path, tmp_path: Path, call: Call
) -> None:
    start, group = first_mark(folder), [first_mark(folder) + number for number in range(8)]
    words = ["run", bundle, QUESTION, "--json", "--steps", 1, "--max-tokens", 11]
    at_once = call(*words, "--picture-scale", "1e5").document["tokens"]["ids"]
    assert at_once[:8] == group
    later = call(*words, "--picture-scale", "1e5", "--min-tokens", 3).document["tokens"]["ids"]
    assert start not in later[:3] and later[3:] == group
    none = call(*words, "--picture-scale", "1e5", "--min-tokens", 11, "-o", tmp_path / "out")
    assert none.code == 0 and none.document["images"] == [] and "parts" not in none.document
    assert "no picture came; --picture-scale above 1" in none.err and "text alone, so nothing is written" in none.err
    short = call(*words[:-1], 5, "--picture-scale", "1e5")
    assert short.code == 0 and "ends before a group of 8 tokens" in short.err and "5 of 5 tokens are left" in short.err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--draw", 0], "0 pictures cannot be drawn for one; give 1 to 64"),
        (["--draw", 65], "65 pictures cannot be drawn for one; give 1 to 64"),
        (["--seed", -1], "the seed -1 is outside 64 bits; give 0 to 18446744073709551615"),
        (["--seed", 2**64], "the seed 18446744073709551616 is outside 64 bits"),
        (["--picture-scale", 0], "group_scale is 0.0; it must be above 0"),
        (["--picture-scale", "1e7"], "group_scale is 10000000.0; it must be above 0 (1 is off) and at most 1000000"),
        (["--picture-scale", "nan"], "group_scale is nan; it must be above 0"),
        (["--min-tokens", -1], "min_tokens is -1; it must be 0 or more"),
        (["--beams", 2], "a search keeps no hidden states, which this bundle's answers are made of; use beams 1"),
        (["--preview-every", 1, "-o", "a.html"], "writes into a folder, and a.html is a page"),
        (["--prompt-file", "p.json"], "there are several questions; give one of PROMPT, --prompt-file, --describe"),
        (["-o", "none/a.html"], "none is no folder; make it"),
    ],
)
def test_what_cannot_be_is_said_before_the_text(option: list[object], message: str, bundle: Path, call: Call) -> None:
    said = call("run", bundle, QUESTION, *option)
    assert said.code == 2 and message in said.error


def test_parts_and_pictures_beside_them_are_refused(bundle: Path, tmp_path: Path, call: Call) -> None:
    (tmp_path / "parts.json").write_text('["a"]')
    said = call("run", bundle, "--prompt-file", tmp_path / "parts.json", "--image", tmp_path / "x.png")
    assert said.code == 2 and said.error == "the pictures stand in --prompt-file; leave out --image"
    said = call("chat", bundle, "-o", tmp_path / "a.html")
    assert said.code == 2 and "give a folder as --out" in said.error
    with mllm_edge.load(bundle, threads=1) as model, pytest.raises(BadInput, match="leave out those beside them"):
        model.generate(["a", noise_picture(0)], noise_picture(1))


def test_a_picture_has_its_place_in_the_text() -> None:
    from mllm_edge.runtime.answer import Answer, Tokens

    image = Image.new("RGB", (2, 2))
    parts = [Picture(span, "", "generated", image) for span in ((0, 2), (2, 4), (2, 4), (9, 9))]
    answer = Answer("[][] and ", Tokens(1, 0, 1, [1]), {}, {}, parts)
    assert answer.in_order == [*parts[:3], " and ", parts[3]]
