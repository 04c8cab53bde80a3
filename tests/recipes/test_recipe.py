"""Recipe files and overrides."""

from pathlib import Path

import pytest

from mllm_edge.errors import BadInput
from mllm_edge.recipes import train
from mllm_edge.recipes.recipe import available, load


def test_every_shipped_recipe_loads() -> None:
    names = available()
    assert {"encoder-pretrain", "lm-pretrain", "llava-pretrain", "llava-finetune"} <= names.keys()
    for name, summary in names.items():
        assert load(name, []).summary == summary != ""


def test_overrides_reach_nested_settings() -> None:
    recipe = load("llava-finetune", ["steps=7", "lr=1e-4", "init.connector=elsewhere", "lora.r=8"])
    assert (recipe.steps, recipe.lr, recipe.init["connector"]) == (7, 1e-4, "elsewhere")
    assert recipe.lora is not None and (recipe.lora.r, recipe.lora.alpha) == (8, 256)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("encoder-pretrian", [], "encoder-pretrain"),
        ("encoder-pretrain", ["stepz=3"], "steps"),
        ("encoder-pretrain", ["steps=many"], "steps"),
        ("encoder-pretrain", ["steps"], "key=value"),
        ("encoder-pretrain", ["steps.x=1"], "plain value"),
        ("nowhere.yaml", [], "nowhere.yaml"),
    ],
)
def test_mistakes_are_named(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load(name, overrides)


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("encoder-wide", "data.widee=0.5", "data.widee changes nothing here"),
        ("encoder-wide", "init.connector=x", "init.connector changes nothing here"),
        ("encoder-pretrain", "connector_lr=1e-4", "connector_lr changes nothing in the task encoder"),
        ("sam-pretrain", "lora.r=8", "lora changes nothing in the task sam"),
        ("sam-wide", "init.sam=PARTS", "init.glamm changes nothing here"),
        ("glamm-wide", "init.llava=tiny", "both a GLaMM and a LLaVA"),
        ("glamm-wide", "data.split=train", "data.split changes nothing here"),
    ],
)
def test_settings_that_nothing_reads_are_refused(tmp_path: Path, name: str, setting: str, message: str) -> None:
    settings = {
        "encoder-wide": ["init.vision_encoder=shipped"],
        "sam-wide": ["init.glamm=tiny"],
        "glamm-wide": ["init.glamm=tiny", "init.vision_encoder=shipped", "init.sam=", "init.connector="],
    }.get(name, [])
    if "PARTS" in setting:
        train(
            "sam-pretrain",
            ["steps=1", "batch=1", "evaluate=0", "workers=0", "precision=fp32", f"out={tmp_path / 'sam'}"],
            False,
            quiet,
        )
        setting = f"init.sam={tmp_path / 'sam'}"
    with pytest.raises(BadInput, match=message):
        train(name, [*settings, setting, f"out={tmp_path / 'run'}"], False, quiet)


def quiet(step: int, steps: int, metrics: dict[str, float]) -> None:
    pass


def test_broken_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: [encoder")
    with pytest.raises(BadInput, match="not valid YAML"):
        load(str(path), [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\n", r"alias"),
        ("[" * 5000, "not valid YAML"),
        ("steps: " + "9" * 5000, "not valid YAML"),
        ("#" * (2 << 20), "larger than 1 MB"),
    ],
)
def test_recipes_that_unfold_without_end(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(BadInput, match=message):
        load(str(tmp_path / "mine.yaml"), [])
