"""A toy system that retrieves: eight forced tokens, a query made of their states, an index that is memory-mapped."""

import json
from pathlib import Path

import numpy as np
import pytest
import toy_marks
import toy_retrieval
from calls_for_tests import Call
from PIL import Image
from torch import Tensor
from toy_marks import marked
from toy_retrieval import SCALE, asked, photographs, seen
from toys import noise_picture, register

import mllm_edge
from mllm_edge import index as indexing
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput
from mllm_edge.export.export import export
from mllm_edge.runtime.answers.index import Index
from mllm_edge.runtime.embedding import Embedder
from mllm_edge.runtime.turn import Drawing


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return marked(tmp_path_factory.mktemp("marked"))


@pytest.fixture(scope="module", params=["onnx", "gguf"])
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    if request.param == "gguf":
        pytest.importorskip("llama_cpp")
    with pytest.MonkeyPatch.context() as patch:
        register(patch, toy_marks.dims(folder), toy_retrieval.plan)
        out = tmp_path_factory.mktemp("retrieved") / "toy.bundle"
        return export(
            "toy", str(folder), llm=request.param, quant="f32" if request.param == "gguf" else "fp32", out=out
        )


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("places") / "photos", 60)


@pytest.fixture(scope="module")
def index(bundle: Path, photos: Path) -> Path:
    with Embedder(bundle, threads=1) as embedder:
        return indexing.build(embedder, [photos], photos.with_name("photos.index"), force=True).folder


def nearest(states: Tensor, photos: Path) -> list[tuple[str, float]]:
    """By brute force, for each eight states."""
    files = sorted(photos.rglob("*.png"))
    scores = [seen(files) @ asked(group) for group in states.split(8)]
    return [(files[int(each.argmax())].name, SCALE * float(each.max())) for each in scores]


def test_every_row_of_parity_passes(bundle: Path) -> None:
    rows = {row.name: row for row in read_manifest(bundle).parity}
    assert all(row.passed for row in rows.values())
    assert rows["retrieved"].measured["same_files"] == 1.0
    assert rows["retrieved"].measured["pictures"] >= 4


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_nearest_pictures_are_found(bundle: Path, folder: Path, index: Path, photos: Path, seed: int) -> None:
    tokens, states = toy_marks.answer(folder, "find a cat", noise_picture(seed), 40)
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        answer = model.generate("find a cat", noise_picture(seed), drawing=Drawing(index=Index(index)))
    assert answer.tokens.ids == tokens
    wanted = nearest(states, photos) if len(states) else []
    assert [Path(part.file).name for part in answer.images] == [name for name, _ in wanted]
    np.testing.assert_allclose([part.score or 0 for part in answer.images], [score for _, score in wanted], atol=1e-4)
    for part, (name, _) in zip(answer.images, wanted, strict=True):
        assert part.origin == "retrieved"
        np.testing.assert_array_equal(np.asarray(part.image), noise_picture(int(name.removesuffix(".png"))))


def test_words_look_for_what_their_answer_would(bundle: Path, folder: Path, index: Path, call: Call) -> None:
    states = toy_marks.forced(folder, "find a cat")
    with mllm_edge.load(bundle, threads=1, kv_type="f32") as model:
        query = model.query("find a cat")
    np.testing.assert_allclose(query / np.linalg.norm(query), asked(states), atol=1e-4)
    said = call("index", "search", index, "--bundle", bundle, "--text", "find a cat", "-n", 3, "--json", "--threads", 1)
    assert [each["file"] for each in said.document["found"]] == [str(f.path) for f in Index(index).nearest(query, 3)]
    with pytest.raises(BadInput, match="the prompt takes"), mllm_edge.load(bundle, threads=1) as model:
        model.query("cat " * 300)


def test_run_shows_what_was_found(bundle: Path, index: Path, photos: Path, tmp_path: Path, call: Call) -> None:
    Image.fromarray(noise_picture(2)).save(tmp_path / "noise.png")
    words = ["run", bundle, "draw a dog", "--image", tmp_path / "noise.png", "--json", "--index", index]
    (found,) = call(*words, "-o", tmp_path / "out").document["images"]
    assert found["origin"] == "retrieved" and Path(found["file"]).resolve().is_relative_to(photos)
    assert Image.open(tmp_path / "out" / "image_0.png").size == (24, 24)


def test_no_index_and_those_of_others_are_named(bundle: Path, index: Path, tmp_path: Path) -> None:
    about = json.loads((index / "index.json").read_text())
    for name in ("vectors.npy", "items.jsonl"):
        (tmp_path / name).write_bytes((index / name).read_bytes())
    (tmp_path / "index.json").write_text(json.dumps({**about, "made_by": "another"}))
    with mllm_edge.load(bundle, threads=1) as model:
        with pytest.raises(BadInput, match="there is no index; give one"):
            model.generate("draw a dog", noise_picture(2))
        with pytest.raises(BadInput, match="made by another model"):
            model.generate("draw a dog", noise_picture(2), drawing=Drawing(index=Index(tmp_path)))
