"""What LLaVA's two stages are fed, and where the connector starts."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mllm_edge.bundle.manifest import Prompt
from mllm_edge.errors import BadInput
from mllm_edge.models.llava.model import CONFIGS, IMAGE_INDEX, Llava
from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes import train
from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.scene_pixels import pixels
from mllm_edge.recipes.data.scene_turns import brief_turns
from mllm_edge.recipes.parts import read_part
from mllm_edge.recipes.recipe import load
from mllm_edge.recipes.tasks.llava import WORD_SCALE, LlavaTask, start_connector
from mllm_edge.scenes import COLORS, sample_scene


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("parts")
    settings = ["batch=2", "steps=1", "evaluate=0", "precision=fp32"]
    for name, recipe in (("vision_encoder", "encoder-pretrain"), ("language_model", "lm-pretrain")):
        train(recipe, [*settings, f"out={folder / name}"], False, lambda step, steps, metrics: None)
    return [f"init.{name}={folder / name}" for name in ("vision_encoder", "language_model")]


def test_a_fresh_connector_speaks_as_loud_as_words() -> None:
    torch.manual_seed(0)
    dims = CONFIGS["tiny"]
    llava = Llava(dims)
    pictures = torch.stack([torch.from_numpy(pixels(sample_scene("train", i), dims)) for i in range(8)])
    start_connector(llava, pictures)
    with torch.no_grad():
        embeds = llava.encode(pictures).flatten(0, 1)
    words = llava.language_model.get_input_embeddings().weight.std()
    torch.testing.assert_close(embeds.mean(dim=0), torch.zeros(embeds.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(embeds.std(dim=0), (WORD_SCALE * words).expand(embeds.shape[1]), atol=0, rtol=1e-3)


def test_brief_turns_follow_the_picture() -> None:
    scene = next(s for s in (sample_scene("train", i) for i in range(50)) if len(s.objects) == 3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        for first, rest in brief_turns(scene, rng, colors=True, telegrams=True):
            said = f"{first} {rest}"
            assert any(all(word in said for word in (o.size, *o.pair)) for o in scene.objects)
        for telegrams in (True, False):
            turns = brief_turns(scene, rng, colors=False, telegrams=telegrams)
            assert turns and len(set(turns)) == len(turns)
            assert not [turn for turn in turns if any(color in " ".join(turn) for color in COLORS)]


def test_stages_learn_answers_alone_after_one_picture(parts: list[str]) -> None:
    task = LlavaTask(load("llava-pretrain", parts), "pretrain")
    forms = set()
    for index in range(30):
        sample, picture = task.sample(index)
        assert sample.ids.count(IMAGE_INDEX) == task.dims.vision.patches
        assert picture.shape == (3, 128, 128)
        learned = [token for token in sample.labels if token != IGNORE]
        assert 2 in learned and IMAGE_INDEX not in learned
        forms.add(sample.ids[1] == IMAGE_INDEX)
    assert forms == {True, False}  # brief samples open with the picture, the others with the template


def test_the_connector_has_a_rate_of_its_own(parts: list[str]) -> None:
    recipe = load("llava-pretrain", [*parts, "lr=3e-4"])
    rates = {p: g["lr"] for g in LlavaTask(recipe, "finetune").parameters() for p in g["params"]}
    assert set(rates.values()) == {3e-4}
    task = LlavaTask(load("llava-pretrain", [*parts, "lr=3e-4", "connector_lr=1e-5"]), "finetune")
    rates = {id(p): g["lr"] for g in task.parameters() for p in g["params"]}
    assert {rates[id(p)] for p in task.model.llava.connector.parameters()} == {1e-5}
    assert {rates[id(p)] for p in task.model.llava.language_model.parameters()} == {3e-4}
    assert all(id(p) not in rates for p in task.model.llava.vision_encoder.parameters())


def test_a_run_may_begin_at_a_whole_llava_with_another_encoder(tmp_path: Path) -> None:
    settings = [
        "batch=2",
        "steps=1",
        "evaluate=1",
        "precision=fp32",
        "warmup=0.0",
        "workers=0",
        f"out={tmp_path / 'run'}",
    ]
    report = train("llava-wide", [*settings, "init.llava=tiny", "init.vision_encoder=shipped"], False, lambda *_: None)
    assert {"validation_exact", "wide_validation_exact", "wide_held_out_exact"} <= report["metrics"].keys()
    trained = resolve("llava", str(tmp_path / "run" / "checkpoint"))
    before, encoder = resolve("llava", "tiny"), read_part("shipped", "vision_encoder")
    name = "embeddings.position_embedding.weight"
    assert torch.equal(trained.tensors[f"vision_encoder.{name}"].float(), encoder[name])
    assert trained.dims == before.dims and trained.tokenizer != before.tokenizer
    head = "language_model.lm_head.weight"
    assert not torch.equal(trained.tensors[head], before.tensors[head])
    assert (trained.tensors[head].float() - before.tensors[head].float()).abs().max() < 0.01


def not_followed() -> tuple[Prompt, str]:
    raise BadInput("chat_template.jinja has a chat template that has a loop; name its prompt by --template")


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (lambda: (PROMPTS["llava_llama_2"], "conv_mode of config.json"), "conv_mode of config.json"),
        (not_followed, "chat_template.jinja has a chat template that has a loop"),
    ],
    ids=["another", "not-followed"],
)
def test_a_llava_with_another_prompt_is_trained_with_ours_and_says_so(
    monkeypatch: pytest.MonkeyPatch, prompt: Callable[[], tuple[Prompt, str]], reason: str
) -> None:
    start = replace(resolve("llava", "tiny"), prompt=prompt)
    monkeypatch.setattr("mllm_edge.recipes.tasks.llava.resolve", lambda *_: start)
    told = f"its-own has a prompt of its own ({reason}); it is trained, and then exported, with vicuna_v1"
    with pytest.warns(UserWarning, match=f"^{re.escape(told)}$"):
        LlavaTask(load("llava-wide", ["init.llava=its-own", "init.vision_encoder=shipped"]), "finetune")
