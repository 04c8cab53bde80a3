"""Every public layout of one LLaVA gives the same canonical tensors."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints_to_test import canonical, port, write_original, write_weights

from mllm_edge.errors import BadInput
from mllm_edge.models.llava.layouts import load, save_llava
from mllm_edge.models.llava.model import build, tensor_shapes
from mllm_edge.models.plan import Checkpoint
from mllm_edge.models.resolve import resolve


@pytest.fixture(scope="module")
def model() -> transformers.LlavaForConditionalGeneration:
    return port()


def same(checkpoint: Checkpoint, model: transformers.LlavaForConditionalGeneration) -> None:
    expected = canonical(model)
    assert set(tensor_shapes(checkpoint.dims)) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensors[name], tensor), name


def with_tokenizer(folder: Path) -> Path:
    (folder / "tokenizer.model").write_bytes(b"read by others")
    return folder


@pytest.mark.parametrize("shard", ["50GB", "40KB"])
def test_transformers_layout(tmp_path: Path, model: transformers.LlavaForConditionalGeneration, shard: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "40KB")
    checkpoint = load(with_tokenizer(tmp_path))
    same(checkpoint, model)
    assert checkpoint.dims.fit == "crop"
    assert checkpoint.dims.template == "vicuna_v1_no_system"


def test_old_names_of_transformers(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    model.config.save_pretrained(tmp_path)
    old = {}
    for name, tensor in canonical(model).items():
        name = name.replace("vision_encoder.", "vision_tower.vision_model.")
        name = name.replace("connector.0", "multi_modal_projector.linear_1")
        old[name.replace("connector.2", "multi_modal_projector.linear_2")] = tensor
    write_weights(old, tmp_path, "safetensors")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_pad": True, "image_mean": [0.5] * 3}))
    checkpoint = load(with_tokenizer(tmp_path))
    same(checkpoint, model)
    assert (checkpoint.dims.fit, checkpoint.dims.mean) == ("pad", (0.5, 0.5, 0.5))


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("inside", [False, True])
def test_original_layout(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration, suffix: str, inside: bool
) -> None:
    checkpoint = load(with_tokenizer(write_original(model, tmp_path / "llava-v1.5-small", suffix, inside)))
    same(checkpoint, model)
    assert (checkpoint.dims.fit, checkpoint.dims.template) == ("pad", "vicuna_v1")
    assert checkpoint.dims.language.vocabulary == 448


def test_our_layout(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    dims = load(with_tokenizer(write_original(model, tmp_path / "a", "bin"))).dims
    tokenizer = with_tokenizer(tmp_path)
    save_llava(tmp_path / "ours", "small", dims, canonical(model), tokenizer, torch.float32)
    checkpoint = resolve("llava", str(tmp_path / "ours"), None)
    same(checkpoint, model)
    assert (checkpoint.dims, checkpoint.config) == (dims, "small")


def test_lora_layout(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    base = with_tokenizer(write_original(model, tmp_path / "base", "bin"))
    lora = tmp_path / "llava-v1.5-lora"
    lora.mkdir()
    config = json.loads((base / "config.json").read_text())
    (lora / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(base / "clip")}))
    adapter = {"r": 2, "lora_alpha": 6, "base_model_name_or_path": str(base)}
    (lora / "adapter_config.json").write_text(json.dumps(adapter))
    target = "model.layers.1.mlp.up_proj"
    a, b = torch.randn(2, 64), torch.randn(96, 2)
    weights = {f"base_model.model.{target}.lora_A.weight": a, f"base_model.model.{target}.lora_B.weight": b}
    torch.save(weights, lora / "adapter_model.bin")
    torch.save({"base_model.model.model.mm_projector.0.bias": torch.full((64,), 3.0)}, lora / "non_lora_trainables.bin")
    checkpoint = load(with_tokenizer(lora))
    before = canonical(model)[f"language_model.{target}.weight"]
    assert torch.allclose(checkpoint.tensors[f"language_model.{target}.weight"], before + 3 * b @ a, atol=1e-5)
    assert torch.equal(checkpoint.tensors["connector.0.bias"], torch.full((64,), 3.0))


def test_the_reference_is_transformers(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    model.save_pretrained(tmp_path)
    ours = build(load(with_tokenizer(tmp_path)))
    ids = torch.tensor([[1, 5, *[420] * 16, 7, 9]])
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits
        embeds = ours.splice(ids.masked_fill(ids == 420, -200), ours.encode(pixels))
        measured = ours.language_model(inputs_embeds=embeds).logits
    assert torch.allclose(measured, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "qwen2 checkpoint, not LLaVA"),
        ({"model_type": "llava_qwen"}, "llava_qwen checkpoint, not LLaVA"),
        ({"image_aspect_ratio": "anyres"}, "anyres"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_use_im_start_end": True}, "im_start"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "scaled rotary"),
        ({"mm_vision_tower": "nowhere"}, "nowhere"),
        ({"hidden_size": 128}, "do not fit"),
        ({"mm_projector_type": "mlp3x_gelu"}, r"connector\.4"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration, change: dict[str, object], message: str
) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    config = {**json.loads((folder / "config.json").read_text()), **change}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=message):
        load(folder)


def test_weights_of_another_system_and_no_tokenizer(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"system": "glamm"}))
    with pytest.raises(BadInput, match="weights of glamm"):
        load(tmp_path)
    with pytest.raises(BadInput, match=r"no tokenizer\.model"):
        load(write_original(model, tmp_path / "llava", "bin"))


def test_a_missing_head_is_not_taken_for_a_tied_one(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration
) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["lm_head.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"lm_head\.weight"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert load(folder).dims.language.tied


def test_missing_weights_are_named(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["model.norm.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"lacks 1 tensors \(language_model\.model\.norm\.weight\)"):
        load(folder)
