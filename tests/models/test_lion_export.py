"""A small random LION through export, verification and the runtime, against PyTorch put together by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from calls_for_tests import Call
from fake_gpu import Device, install
from PIL import Image
from toys import letters, noise_picture

import mllm_edge
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.export.export import export
from mllm_edge.export.tensorrt.build import build_bundle
from mllm_edge.models.blocks.eva import EvaDims
from mllm_edge.models.blocks.qformer import QFormerDims
from mllm_edge.models.blocks.swin import SwinDims
from mllm_edge.models.language.t5 import T5Dims
from mllm_edge.models.language.t5_parts import T5Reference, task_rows
from mllm_edge.models.lion.layouts import load, save_lion
from mllm_edge.models.lion.model import Lion, LionDims, Tagger, TaggerDims
from mllm_edge.models.lion.plan import preprocessing
from mllm_edge.runtime.preprocess import preprocess

TAGS = ["red", "blue", "a ring", "round"]
DIMS = LionDims(
    vision=EvaDims(image_size=28, patch_size=7, width=48, heads=4, mlp_width=64, taps=(2, 1, 0)),
    qformer=QFormerDims(24, 2, 2, 32, queries=5, read_width=48, vocabulary=36, positions=16),
    language=T5Dims(
        36, 32, 48, layers=2, heads=2, head_width=8, context=256, activation="gelu", bottleneck=4
    ),
    aggregator_heads=4,
    aggregator_mlp=64,
    question_length=12,
    tagger=TaggerDims(SwinDims(32, 8, (1, 1), (2, 2), window=4), 4, label_width=12, width=16, heads=2, mlp_width=24),
)  # fmt: skip
SOFT, CLS, SEP = 33, 34, 35
ORDER = " abcdefghijklmnopqrstuvwxyz.,:?"


def spread(module: torch.nn.Module) -> None:
    """Weights so large that outputs differ."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            small = "norm" in name.lower() or name.endswith(("scale", "ratio1", "ratio2"))
            parameter.add_(torch.randn_like(parameter) * (0.05 if small else 0.25))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lion")
    texts = letters(folder / "texts", {"<extra_id_0>": SOFT, "[CLS]": CLS, "[SEP]": SEP})
    letters(texts / "question", {"<extra_id_0>": SOFT, "[CLS]": CLS, "[SEP]": SEP})
    (texts / "tags.json").write_text(json.dumps({"tags": TAGS, "thresholds": [0.1, 0.2, 1.0, 0.3]}))
    torch.manual_seed(0)
    lion, tagger = Lion(DIMS).eval(), Tagger(DIMS.tagger).eval()
    spread(lion)
    spread(tagger)
    with torch.no_grad():
        lion.language_model.lm_head.weight[1] = 0  # no end
    state = {**lion.state_dict(), **{f"tagger.{name}": tensor for name, tensor in tagger.state_dict().items()}}
    save_lion(folder / "checkpoint", "micro", DIMS, state, texts, torch.float32)
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export("lion", str(checkpoint), quant="fp32", out=tmp_path_factory.mktemp("bundle") / "lion.bundle")


def ids(text: str) -> list[int]:
    """Letters by hand; what the alphabet lacks is 0."""
    return [2 + ORDER.index(letter) if letter in ORDER else 0 for letter in text.lower()]


def expected(
    checkpoint: Path, question: str, task: int, picture: np.ndarray, number: int
) -> tuple[list[int], list[str]]:
    """Greedy tokens of PyTorch, and the tags."""
    opened = load(checkpoint)
    lion, tagger = Lion(DIMS).eval(), Tagger(DIMS.tagger).eval()
    lion.load_state_dict({name: opened.tensors[name] for name in lion.state_dict()})
    tagger.load_state_dict({name: opened.tensors[f"tagger.{name}"] for name in tagger.state_dict()})
    seen, tagged = (torch.from_numpy(preprocess(Image.fromarray(picture), one)) for one in preprocessing(DIMS))
    with torch.no_grad():
        chances = tagger(tagged)[0].tolist()
        tags = [tag for tag, chance, least in zip(TAGS, chances, (0.1, 0.2, 1.0, 0.3), strict=True) if chance > least]
        heard = [CLS, *ids(question)[-10:], SEP]
        visual = lion.look(seen, torch.tensor([heard + [0] * (12 - len(heard))]))[0]
        before, after = "According to ", ", you are allowed to use or partially use the following tags: ["
        after += ", ".join(tags) + "]. " + question
        text = lion.embed(torch.tensor([*ids(before), SOFT, *ids(after), 1]), SOFT)
        rows = np.concatenate([task_rows(DIMS.language)[task], visual.numpy(), text.numpy()])
    return T5Reference(lion.language_model).generate(rows, number), tags


def test_every_stage_and_answer_is_that_of_pytorch(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    rows = {row.name: row for row in manifest.parity}
    assert set(rows) == {"vision_encoder", "queries", "aggregator", "task", "tagger", "language_model", "end_to_end"}
    assert all(row.passed for row in rows.values())
    assert manifest.generation.beams == 5 and manifest.generation.repeat_penalty == 1.5


@pytest.mark.parametrize(("task", "kind"), [("vqa", 1), ("reg", 0)])
def test_answers_by_hand(bundle: Path, checkpoint: Path, task: str, kind: int) -> None:
    question, picture = "where is the ring, please?", noise_picture(2)
    wanted, tags = expected(checkpoint, question, kind, picture, 8)
    other, _ = expected(checkpoint, question, 1 - kind, picture, 8)
    assert wanted != other and "a ring" not in tags
    with mllm_edge.load(bundle, threads=1) as model:
        answer = model.generate(question, picture, task=task, beams=1, repeat_penalty=1.0, max_tokens=8)
    assert answer.tokens.ids == wanted


@pytest.mark.parametrize(
    ("question", "task"),
    [
        ("In the image <image>, can you locate a ring and let me know its coordinates?", "rec"),
        ("What is in the region [0.1,0.1,0.2,0.2]?", "reg"),
        ("Please DESCRIBE the image.", "caption"),
        ("how many rings?", "vqa"),
    ],
)
def test_the_words_suggest_the_task(bundle: Path, question: str, task: str) -> None:
    with mllm_edge.load(bundle, threads=1) as model:
        assert model.task_of(question) == task and model.task_of(question, "reg") == "reg"
        answer = model.generate(question, noise_picture(1), beams=1, max_tokens=30)
        assert answer.task == answer.to_json()["task"] == task


def test_tags_of_the_tagger_of_the_user_and_none(bundle: Path, checkpoint: Path) -> None:
    question = "a ring?"
    seen = [(picture, expected(checkpoint, question, 1, picture, 1)[1]) for picture in map(noise_picture, range(12))]
    picture, found = next((picture, tags) for picture, tags in seen if tags)
    with mllm_edge.load(bundle, threads=1) as model:
        answer = model.generate(question, picture, beams=1, max_tokens=3)
        assert answer.tags == answer.to_json()["tags"] == found and found
        same = model.generate(question, picture, tags=found, beams=1, max_tokens=3)
        assert same.tokens == answer.tokens
        other = model.generate(question, picture, tags=["tiny things"], beams=1, max_tokens=3)
        assert other.tags == ["tiny things"] and other.tokens.prompt != answer.tokens.prompt
        assert model.generate(question, picture, tags=[], beams=1, max_tokens=3).tags == []
        for tag in ("a]", "[b", " ", "two\nlines"):
            with pytest.raises(BadInput, match="cannot stand in the list of tags"):
                model.generate(question, picture, tags=[tag])
    with mllm_edge.load(bundle, threads=1, tagger=False) as model:
        assert "tagger" not in model.stages
        bare = model.generate(question, picture, beams=1, max_tokens=3)
        assert bare.tags is None and "tags" not in bare.to_json()
        assert bare.tokens.prompt == 1 + 5 + 17 + len(question) + 1  # task, queries, regions, letters, end
        assert model.generate(question, picture, tags=found, beams=1, max_tokens=3).tokens == answer.tokens


def test_engines_of_the_t5_give_what_its_graphs_give(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and with beams, over a cache that grows, with all that passes between engines on the (played) GPU."""
    gpu = Device()
    install(monkeypatch, gpu)
    folder = tmp_path / "lion.bundle"
    with pytest.warns(RuntimeWarning, match="language_model.embed is read by ONNX Runtime: a table needs no engine"):
        export("lion", str(checkpoint), target="trt", precision="fp32", quant="fp32", devices=["orin-nano"], out=folder)
    built = [one.stage for one in build_bundle(folder)]
    assert built[-2:] == ["language_model.encoder", "language_model.decoder"]
    rows = {row.name: row for row in read_manifest(folder).parity}
    assert rows["language_model.decoder on sm_87"].passed
    asked = [("what is it?", 1, 150), ("a ring?", 3, 20), ("the blue ring?", 1, 5), ("is it red?", 5, 12)]
    with mllm_edge.load(folder, "cpu", threads=1) as model:
        expected = [model.generate(q, noise_picture(1), beams=beams, max_tokens=n).tokens for q, beams, n in asked]
    assert len(expected[0].ids) == 150  # more than a new cache holds
    with mllm_edge.load(folder, threads=1) as model:
        found = [model.generate(q, noise_picture(1), beams=beams, max_tokens=n).tokens for q, beams, n in asked]
        assert "sm_87" in model.language_model.about()
        with pytest.raises(MllmEdgeError, match="built for 5 sequences, not 6; ask with --beams 5"):
            model.generate("what?", noise_picture(1), beams=6, max_tokens=4)
    assert found == expected
    assert not gpu.held


def test_boxes_are_words(bundle: Path, picture: Path, call: Call) -> None:
    said = call("run", bundle, "--region", "3,5,15,20", "--image", picture, "--beams", 1, "--max-tokens", 2, "--json")
    words = call("run", bundle, "What is in the region [0.100,0.250,0.500,1.000] of the image?", "--image", picture,
                 "--beams", 1, "--max-tokens", 2, "--json")  # fmt: skip
    assert said.document["tokens"] == words.document["tokens"] and said.document["task"] == "reg"
    assert "task reg, as the question sounds; --task chooses another" in said.err
    for command, part in (
        (("What is at <bbox>?",), "the question has 1 <bbox> for 0 box(es); give one box (--box) for each"),
        (("--locate", " "), "needs what it is about"),
        (("", "--task", "rec"), "does not say what to look for (task rec)"),
        (("In the image <image>, can you locate  and let me know its coordinates?",), "does not say what to look for"),
        (("red?", "--task", "find"), "there is no task 'find'; this bundle has vqa, caption, rec, reg"),
        (("red?", "--tags", "red]"), "the tag 'red]' cannot stand in the list of tags"),
        (("a" * 300,), "but the encoder takes 256; shorten it"),
    ):
        refused = call("run", bundle, *command, "--image", picture)
        assert refused.code == 2 and part in refused.err, refused.err
