"""Adapters as peft saves them, whatever they hold."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from mllm_edge.checkpoints.lora import merge_lora
from mllm_edge.checkpoints.tensors import open_folder, renamed
from mllm_edge.errors import BadInput


def base(folder: Path) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["embed_tokens", "v_proj"]},
    ],
)
def test_whole_tensors_and_embeddings_merge_as_in_peft(tmp_path: Path, settings: dict[str, object]) -> None:
    adapted = peft.get_peft_model(base(tmp_path), peft.LoraConfig(r=3, lora_alpha=5, **settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    expected = adapted.merge_and_unload().state_dict()
    measured = merge_lora(open_folder(tmp_path), tmp_path / "adapter")
    assert set(measured) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(measured[name], tensor, atol=1e-6, rtol=0)
        assert measured.shape(name) == tuple(tensor.shape)


def test_names_of_the_adapters_model_are_translated(tmp_path: Path) -> None:
    model = base(tmp_path)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    ours = renamed(open_folder(tmp_path), lambda name: f"ours.{name}")
    measured = merge_lora(ours, tmp_path / "adapter", lambda name: f"ours.{name}")
    expected = adapted.merge_and_unload().state_dict()["model.layers.0.self_attn.o_proj.weight"]
    torch.testing.assert_close(measured["ours.model.layers.0.self_attn.o_proj.weight"], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("peft_type", "IA3"), ("use_dora", True), ("rank_pattern", {"q_proj": 8}), ("fan_in_fan_out", True)],
)
def test_other_kinds_of_adapters_are_named(tmp_path: Path, key: str, value: object) -> None:
    base(tmp_path)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=rf"adapter_config\.json has {key}"):
        merge_lora(open_folder(tmp_path), tmp_path)


def test_a_tensor_that_fits_nothing_is_named(tmp_path: Path) -> None:
    base(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    save_file({"base_model.model.head.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=r"fits no weight of the base model \(head\.weight\)"):
        merge_lora(open_folder(tmp_path), tmp_path)
