"""A connector learns to say what pictures show in the decoder's word embeddings."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_edge.errors import BadInput
from mllm_edge.models.llava.model import CONFIGS, Llava
from mllm_edge.models.resolve import shipped
from mllm_edge.recipes.data.readers import Conversation
from mllm_edge.recipes.parts import read_part, save_part
from mllm_edge.recipes.recipe import Recipe
from mllm_edge.recipes.tasks.naming import WORD_SCALE, NamingTask, named, whitening
from mllm_edge.recipes.trainer import run

THINGS = {"red": (215, 30, 35), "green": (30, 165, 55), "blue": (35, 75, 235), "white": (244, 244, 244)}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    torch.manual_seed(0)
    llava = Llava(CONFIGS["tiny"])
    state = llava.state_dict()
    for part in ("vision_encoder", "language_model"):
        save_part(tmp_path, part, {}, state, f"{part}.", "float32")
    shutil.copy(shipped("llava") / "tiny" / "tokenizer.model", tmp_path)
    entries = []
    for name, color in THINGS.items():
        Image.new("RGB", (128, 128), color).save(tmp_path / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"A {name}."}]
        entries.append({"id": name, "image": f"{name}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return Recipe(
        task="naming",
        out=str(tmp_path / "run"),
        steps=40,
        batch=4,
        lr=3e-3,
        evaluate=10,
        precision="fp32",
        init=dict.fromkeys(("vision_encoder", "language_model"), str(tmp_path)),
        data={
            "conversations": str(tmp_path / "data.json"),
            "images": str(tmp_path),
            "tests": [str(tmp_path / "data.json")],
        },
    )


def test_pictures_come_to_point_at_their_names(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    task = NamingTask(recipe)
    assert task.names == sorted(THINGS)
    before = task.evaluate(10)["data"]
    report: dict[str, Any] = run(recipe, task, False, lambda *_: None)
    assert report["metrics"] == {"data": 1.0}
    assert before < 1

    words = read_part(recipe.init["language_model"], "language_model")["model.embed_tokens.weight"]
    connector = CONFIGS["tiny"], read_part(recipe.out, "connector")
    llava = Llava(connector[0])
    llava.connector.load_state_dict(connector[1])
    features = torch.from_numpy(np.array([task.sample(index)[0] for index in range(4)])).float()
    with torch.no_grad():
        embeds = llava.connector(features)
    assert float(embeds.std()) == pytest.approx(WORD_SCALE * float(words.std()), rel=0.05)
    names = torch.nn.functional.normalize(task.model.names, dim=-1)
    nearest = (embeds.mean(dim=1) @ names.T).argmax(-1)  # in the decoder's own space, not only after whitening
    assert nearest.tolist() == [task.sample(index)[1] for index in range(4)]


def test_what_the_encoder_sees_is_computed_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = dataclasses.replace(recipe, data={**recipe.data, "variations": 3})
    seen: list[int] = []
    encode = NamingTask._encode
    monkeypatch.setattr(NamingTask, "_encode", lambda self, x: (seen.append(len(x)), encode(self, x))[1])
    first = NamingTask(recipe)
    assert first.features.shape[0] == 3 * len(THINGS) == sum(seen)
    again = NamingTask(recipe)
    assert 3 * len(THINGS) == sum(seen)
    np.testing.assert_array_equal(first.features, again.features)
    NamingTask(dataclasses.replace(recipe, seed=1))
    assert 6 * len(THINGS) == sum(seen)


def test_whitened_names_vary_alike_in_all_directions() -> None:
    torch.manual_seed(0)
    names = torch.randn(4000, 5) * torch.tensor([9.0, 3.0, 1.0, 1.0, 1.0]) + 7
    white = names @ whitening(names)
    spread = torch.linalg.eigvalsh(torch.cov(white.T))
    assert float(spread.max() / spread.min()) < 3  # 81 before


def test_an_epoch_shows_every_picture_once(recipe: Recipe) -> None:
    task = NamingTask(recipe)
    epochs = [[task.sample(4 * epoch + place)[1] for place in range(4)] for epoch in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


@pytest.mark.parametrize(
    ("answer", "name"), [("A red apple.", "red apple"), ("An owl.", "owl"), ("Skis.", "skis"), ("A.", "a")]
)
def test_names(answer: str, name: str) -> None:
    assert named(Conversation("1", None, (("What?", answer),))) == name


def test_it_needs_names(recipe: Recipe) -> None:
    with pytest.raises(BadInput, match=r"needs data\.conversations"):
        NamingTask(Recipe(task="naming", out="x", init=recipe.init))
