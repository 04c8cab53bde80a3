"""One small random LLaVA in every public layout, and a tokenizer for it."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

IMAGE = 420  # the id of <image>, after 420 trained pieces
SIZE, PATCH = 28, 7


def port() -> transformers.LlavaForConditionalGeneration:
    """transformers' LLaVA: 3 CLIP blocks of width 32, 2 LLaMA blocks of width 64, 448 rows (422 tokens)."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=PATCH,
        ).to_dict(),
        text_config=transformers.LlamaConfig(
            vocab_size=448,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
        ).to_dict(),
        image_token_index=IMAGE,
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, std=0.1, mean=1.0 if norm else 0.0)
    return model


def canonical(model: transformers.LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The model's weights as the loader must name them."""
    result = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        if name.startswith("vision_tower."):
            name = "vision_encoder." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
        elif name.startswith("language_model."):
            name = "language_model.model." + name.removeprefix("language_model.")
        elif name.startswith("lm_head"):
            name = "language_model." + name
        name = name.replace("multi_modal_projector.linear_1", "connector.0")
        name = name.replace("multi_modal_projector.linear_2", "connector.2")
        if "post_layernorm" not in name and "encoder.layers.2." not in name:
            result[name] = tensor
    return result


def write_original(
    model: transformers.LlavaForConditionalGeneration, folder: Path, suffix: str, inside: bool = False
) -> Path:
    """The layout of `liuhaotian/llava-v1.5-*`; CLIP lies in `clip/` below it, or inside its weights."""
    folder.mkdir()
    state, clip = {}, {}
    for name, tensor in canonical(model).items():
        if name.startswith("vision_encoder."):
            clip["vision_model." + name.removeprefix("vision_encoder.")] = tensor
        elif name.startswith("connector."):
            state[name.replace("connector.", "model.mm_projector.")] = tensor
        else:
            state[name.removeprefix("language_model.")] = tensor
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if inside:
        state |= {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in clip.items()}
    text = model.config.text_config
    config = {
        "model_type": "llava_llama",
        "mm_vision_tower": "clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": 10000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(state, folder, suffix)
    (folder / "clip").mkdir()
    vision = model.config.vision_config.to_dict()
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    if not inside:
        write_weights({**clip, "logit_scale": torch.ones(1)}, folder / "clip", suffix)
    return folder


def write_weights(state: dict[str, torch.Tensor], folder: Path, suffix: str) -> None:
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if suffix == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")
