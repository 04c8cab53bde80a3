"""A toy system that retrieves: eight forced tokens, a query made of their states, an index that is memory-mapped."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy_marks
from PIL import Image
from torch import Tensor, nn
from toy_marks import WIDTH, marked
from toys import noise_picture, register, seeded

import mllm_edge
from mllm_edge import cli
from mllm_edge.bundle.answers import RetrievedAnswer
from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput
from mllm_edge.export.export import export
from mllm_edge.models.plan import Checkpoint, ExportPlan, StageExport
from mllm_edge.runtime.answers.index import Index
from mllm_edge.runtime.turn import Drawing

QUERY, ITEMS, SCALE = 5, 200, 2.0


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8 * WIDTH, QUERY)

    def forward(self, marks: Tensor) -> Tensor:
        return nn.functional.normalize(self.line(marks.flatten()[None]), dim=-1)  # [8,W] -> [1,d]


HEAD = seeded(Head, 31)


def plan(checkpoint: Checkpoint) -> ExportPlan:
    marks = TensorSpec("marks", "float32", [8, WIDTH])
    head = StageExport("head", HEAD, [marks], [TensorSpec("query", "float32", [1, QUERY])], ("fp32",))
    return toy_marks.plan(checkpoint, stages=[head], answers=[RetrievedAnswer("marks", "query", SCALE)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return marked(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random unit vectors, and a small picture for each whose color is its number."""
    where = tmp_path_factory.mktemp("index")
    vectors = np.random.default_rng(33).standard_normal((ITEMS, QUERY)).astype(np.float32)
    np.save(where / "vectors.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    for number in range(ITEMS):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(where / f"{number}.png")
    (where / "items.json").write_text(json.dumps([f"{number}.png" for number in range(ITEMS)]))
    return where


@pytest.fixture(scope="module")
def bundle(folder: Path, index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        register(patch, toy_marks.dims(folder), plan)
        out = tmp_path_factory.mktemp("retrieved") / "toy.bundle"
        return export("toy", str(folder), quant="f32", out=out, drawing=Drawing(index=Index(index)))


def nearest(states: Tensor, index: Path) -> list[tuple[str, float]]:
    """By brute force, for each eight states."""
    vectors = np.load(index / "vectors.npy")
    with torch.no_grad():
        scores = [vectors @ HEAD()(group)[0].numpy() for group in states.split(8)]
    return [(f"{int(each.argmax())}.png", SCALE * float(each.max())) for each in scores]


def test_every_row_of_parity_passes(bundle: Path) -> None:
    rows = {row.name: row for row in read_manifest(bundle).parity}
    assert all(row.passed for row in rows.values())
    assert rows["retrieved"].measured["same_files"] == 1.0
    assert rows["retrieved"].measured["pictures"] >= 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_nearest_pictures_are_found(bundle: Path, folder: Path, index: Path, seed: int) -> None:
    tokens, states = toy_marks.answer(folder, "find a cat", noise_picture(seed), 40)
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        answer = model.generate("find a cat", noise_picture(seed), drawing=Drawing(index=Index(index)))
    assert answer.tokens.ids == tokens
    wanted = nearest(states, index) if len(states) else []
    assert [Path(part.file).name for part in answer.images] == [name for name, _ in wanted]
    np.testing.assert_allclose([part.score or 0 for part in answer.images], [score for _, score in wanted], atol=1e-4)
    for part, (name, _) in zip(answer.images, wanted, strict=True):
        assert part.origin == "retrieved" and np.asarray(part.image)[0, 0, 0] == int(name.removesuffix(".png"))


def test_the_index_is_mapped(index: Path) -> None:
    assert isinstance(Index(index)._vectors, np.memmap)


def test_run_shows_what_was_found(
    bundle: Path, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noise_picture(2)).save(tmp_path / "noise.png")
    words = ["run", str(bundle), "draw a dog", "--image", str(tmp_path / "noise.png"), "--threads", "1", "--json"]
    assert cli.main([*words, "--index", str(index), "-o", str(tmp_path / "out")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["images"]
    assert found["origin"] == "retrieved" and Path(found["file"]).parent == index
    assert Image.open(tmp_path / "out" / "image_0.png").size == (2, 2)


def test_no_index_and_a_wrong_one_are_named(bundle: Path, tmp_path: Path) -> None:
    with mllm_edge.load(bundle, threads=1) as model:
        with pytest.raises(BadInput, match="there is no index; give one"):
            model.generate("draw a dog", noise_picture(2))
        np.save(tmp_path / "vectors.npy", np.ones((1, 3), np.float32))
        (tmp_path / "items.json").write_text('["a.png"]')
        with pytest.raises(BadInput, match="embeddings of 3 values, this bundle's have 5"):
            model.generate("draw a dog", noise_picture(2), drawing=Drawing(index=Index(tmp_path)))
    (tmp_path / "items.json").write_text("[]")
    with pytest.raises(BadInput, match="is no index of pictures"):
        Index(tmp_path)


@pytest.mark.parametrize("item", ["/etc/passwd", "../secret.png"])
def test_an_index_stays_in_its_folder(tmp_path: Path, item: str) -> None:
    np.save(tmp_path / "vectors.npy", np.ones((1, 3), np.float32))
    (tmp_path / "items.json").write_text(json.dumps([item]))
    with pytest.raises(BadInput, match="points outside its folder"):
        Index(tmp_path).nearest(np.ones(3, np.float32))
