"""Every public layout of one LLaVA gives the same canonical tensors."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints_to_test import canonical, port, write_original, write_weights
from safetensors.torch import save_file
from tokenizers_to_test import llama_sentencepiece

from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.models.llava.layouts import load, save_llava
from mllm_edge.models.llava.model import build, tensor_shapes
from mllm_edge.models.llava.plan import plan
from mllm_edge.models.plan import Checkpoint
from mllm_edge.models.resolve import resolve, shipped


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


def test_parity_is_with_transformers_own_classes(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration
) -> None:
    model.save_pretrained(tmp_path)
    checkpoint = load(with_tokenizer(tmp_path))
    ours, size = build(checkpoint), checkpoint.dims.vision.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eyes, projector = (checkpoint.references[name]() for name in ("vision_encoder", "connector"))
        features = eyes(pixels)
        torch.testing.assert_close(features, ours.vision_encoder(pixels), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(projector(features), ours.connector(features), atol=1e-5, rtol=1e-5)
        # What our loader gets wrong differs from them.
        broken = ours.vision_encoder
        broken.pre_layrnorm.weight.data *= 1.1
        assert not torch.allclose(eyes(pixels), broken(pixels), atol=1e-3)
    assert not hasattr(eyes, "embeddings") and type(projector).__module__.startswith("transformers.")


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
        ({"mm_use_im_start_end": "yes"}, r"config\.json has mm_use_im_start_end 'yes'"),
        ({"mm_patch_merge_type": "spatial"}, r"config\.json has mm_patch_merge_type 'spatial'"),
        ({"mm_vision_select_layer": 9}, r"config\.json has 3 vision layers, so that none is tapped at 9"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, r"config\.json has rope_scaling 'yarn'"),
        ({"hidden_act": "relu"}, r"config\.json has hidden_act 'relu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "codes of fp8"),
        ({"attention_bias": True}, r"lacks 8 tensors .*q_proj\.bias"),
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


def change(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_a_projector_whose_kind_is_not_said_is_read_from_its_tensors(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration
) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    change(folder, mm_projector_type=None)
    assert load(folder).dims.connector == "mlp2x_gelu"
    change(folder, mm_projector_type="linear")
    with pytest.raises(BadInput, match=r"model\.mm_projector\.2\.weight of .*pytorch_model\.bin"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.2.mlp.up_proj.weight",
        "model.image_newline",
    ],
)
def test_a_tensor_without_a_place_is_named(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration, name: str
) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({**state, name: torch.ones(64)}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=rf"no place for \({name} of .*pytorch_model\.bin"):
        load(folder)


def test_a_projector_alone_on_its_base(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    base = with_tokenizer(write_original(model, tmp_path / "base", "bin"))
    state = torch.load(base / "pytorch_model.bin", weights_only=True)
    alone = tmp_path / "pretrained"
    alone.mkdir()
    torch.save(
        {name: state.pop(name) + 1 for name in list(state) if "mm_projector" in name}, alone / "mm_projector.bin"
    )
    torch.save(state, base / "pytorch_model.bin")
    (alone / "config.json").write_text((base / "config.json").read_text())
    change(alone, mm_vision_tower=str(base / "clip"), _name_or_path=str(base))
    checkpoint = load(alone)
    assert checkpoint.tokenizer == base
    expected = canonical(model)
    assert torch.equal(checkpoint.tensors["connector.2.weight"], expected["connector.2.weight"] + 1)
    norm = "language_model.model.norm.weight"
    assert torch.equal(checkpoint.tensors[norm], expected[norm])


def lora_folder(folder: Path, base: Path, extra: dict[str, torch.Tensor]) -> Path:
    """What LLaVA's training leaves with --lora_enable: no tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    change(folder, mm_vision_tower=str(base / "clip"))
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    torch.save(
        {f"{prefix}A.weight": torch.ones(2, 64), f"{prefix}B.weight": torch.ones(64, 2)}, folder / "adapter_model.bin"
    )
    torch.save(extra, folder / "non_lora_trainables.bin")
    return folder


def test_a_lora_with_a_trained_head_and_without_a_tokenizer(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration
) -> None:
    base = with_tokenizer(write_original(model, tmp_path / "base", "bin"))
    head = torch.randn(448, 64)
    extra = {"base_model.model.model.mm_projector.0.bias": torch.zeros(64), "base_model.model.lm_head.weight": head}
    checkpoint = load(lora_folder(tmp_path / "lora", base, extra))
    assert checkpoint.tokenizer == base
    assert torch.equal(checkpoint.tensors["language_model.lm_head.weight"], head)
    query = "language_model.model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(checkpoint.tensors[query], canonical(model)[query] + 2 * 2)  # alpha / r times r ones
    extra["base_model.model.model.new_part"] = head
    with pytest.raises(BadInput, match=r"no place for \(base_model\.model\.model\.new_part of .*non_lora_trainables"):
        load(lora_folder(tmp_path / "other", base, extra))


@pytest.mark.parametrize("apart", [False, True])
def test_an_adapter_of_transformers_layout(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration, apart: bool
) -> None:
    model.save_pretrained(tmp_path / "base")
    with_tokenizer(tmp_path / "base")
    folder = tmp_path / ("adapter" if apart else "base")
    folder.mkdir(exist_ok=True)
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(tmp_path / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    prefix = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{prefix}A.weight": torch.ones(2, 64), f"{prefix}B.weight": torch.ones(64, 2)},
        folder / "adapter_model.safetensors",
    )
    checkpoint = load(folder)
    query = "language_model.model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(checkpoint.tensors[query], canonical(model)[query] + 4)
    assert checkpoint.tokenizer == tmp_path / "base"


@pytest.mark.parametrize("name", ["llava-v1.5-dev01", "llava-llama-2", "rev02"])
def test_no_letter_of_a_folders_name_chooses_the_prompt(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration, name: str
) -> None:
    folder = write_original(model, tmp_path / name, "bin")
    llama_sentencepiece(folder)
    assert plan(load(folder)).prompt.name == "vicuna_v1"
    change(folder, conv_mode="llava_llama_2")
    made = plan(load(folder))
    assert (made.prompt.name, made.prompt_from) == ("llava_llama_2", "conv_mode of config.json")
    made = plan(resolve("llava", str(folder), template="llava_v0"))
    assert (made.prompt.name, made.prompt_from) == ("llava_v0", "--template")
    change(folder, conv_mode="mpt")
    with pytest.raises(BadInput, match="has conv_mode 'mpt', which is not known; choose one with --template"):
        plan(load(folder))
    with pytest.raises(BadInput, match="unknown template 'v9'; use one of vicuna_v1"):
        resolve("llava", str(folder), template="v9")


def test_the_checkpoints_chat_template_is_the_prompt(
    tmp_path: Path, model: transformers.LlavaForConditionalGeneration
) -> None:
    model.save_pretrained(tmp_path)
    llama_sentencepiece(tmp_path)
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    text += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(text)
    made = plan(load(tmp_path))
    assert made.prompt_from == "the chat template in chat_template.jinja"
    assert (made.prompt.first, made.prompt.next) == ("<user>{text}<end><assistant>",) * 2
    assert (made.prompt.answer, made.prompt.stop) == ("{text}<end>", ["<end>"])


def test_pictures_between_marks(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    folder = write_original(model, tmp_path / "llava", "bin")
    llama_sentencepiece(folder)
    change(folder, mm_use_im_start_end=True)
    with pytest.raises(BadInput, match="has no token <im_start>"):
        plan(load(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"<im_start>": 420, "<im_end>": 421}))
    read_tokenizer.cache_clear()
    made = plan(load(folder))
    assert [(slot.open, slot.close) for slot in made.prompt.slots] == [("<im_start>", "<im_end>")]
    assert made.tokenizers[0].added == ["<im_start>", "<im_end>"]


def test_licence_and_base_of_the_model_card(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    (folder / "README.md").write_text("---\nlicense: llama2\nbase_model:\n- lmsys/vicuna-7b-v1.5\n---\n# A model\n")
    source = load(folder).source
    assert (source["licence"], source["base_model"]) == ("llama2", "lmsys/vicuna-7b-v1.5")


def test_missing_weights_are_named(tmp_path: Path, model: transformers.LlavaForConditionalGeneration) -> None:
    folder = with_tokenizer(write_original(model, tmp_path / "llava", "bin"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["model.norm.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"lacks 1 tensors \(language_model\.model\.norm\.weight\)"):
        load(folder)


@pytest.mark.parametrize(("name", "value"), [("layers", 10**8), ("width", 10**12), ("context", 10**400)])
def test_dims_that_no_model_has_are_refused_at_once(name: str, value: int, tmp_path: Path) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(shipped("llava") / "tiny", folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["dims"]["language"][name] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadInput, match=f"has {name} 10+, which no model has"):
        resolve("llava", str(folder))
