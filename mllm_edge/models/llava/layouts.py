"""LLaVA checkpoints in every public layout, under our canonical names.

Ours (`config.json` with "system"), the original (`liuhaotian/llava-*`, LoRA included) and transformers' port
(`llava-hf/*`, old and new names).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints.tensors import (
    Tensors,
    check_shapes,
    fingerprint,
    merge_lora,
    merged,
    open_file,
    open_folder,
    read_json,
    renamed,
    resolve_folder,
)
from mllm_edge.errors import BadInput, first_line
from mllm_edge.models.blocks.encoders import encoder_dims, encoder_settings
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.layouts import OURS, TOKENIZER_FILES, canonical_name, copy_tokenizer, opened, save
from mllm_edge.models.llava import packaged
from mllm_edge.models.llava.model import IMAGE_MEAN, IMAGE_STD, LlavaDims, tensor_shapes
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch

# The first matching rule gives the canonical name; tensors without a match are dropped (post_layernorm, inv_freq, ...).
_VISION = r"(?:vision_model\.)?(embeddings\.|pre_layrnorm\.|encoder\.layers\.)"
_ORIGINAL = (
    (r"model\.vision_tower\.vision_tower\." + _VISION, r"vision_encoder.\1"),
    (r"model\.mm_projector\.(\d)", r"connector.\1"),
    (r"model\.mm_projector\.(weight|bias)", r"connector.0.\1"),
    (r"(model\.(?:embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"),
)
_PORT = (
    (r"(?:model\.)?vision_tower\." + _VISION, r"vision_encoder.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "connector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "connector.2."),
    (
        r"(?:language_model\.|model\.language_model\.)(?:model\.)?(embed_tokens|layers|norm)\.",
        r"language_model.model.\1.",
    ),
    (r"(?:language_model\.)?lm_head\.", "language_model.lm_head."),
)


def load(folder: Path) -> Checkpoint:
    """Detect a folder's layout and open it.

    Raises:
        BadInput: not LLaVA (names its model type), an unsupported option of LLaVA, missing or misshapen tensors, no
            tokenizer.
    """
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    folders = [folder]  # sources of the weights
    if OURS in config:
        dims, tensors = _ours(folder, config)
        if "packages" in config:
            return _packaged(folder, config, dims, tensors)
    elif "text_config" in config and kind == "llava":
        dims, tensors = _port(folder)
    elif kind in ("llava", "llava_llama"):
        dims, tensors, folders = open_original(folder, config)
    else:
        raise BadInput(f"{folder} is a {kind or 'nameless'} checkpoint, not LLaVA; give a LLaVA checkpoint")
    check_shapes(tensors, tensor_shapes(dims), str(folder))
    if not any((folder / file).is_file() for file in TOKENIZER_FILES[:2]):
        raise BadInput(f"{folder} has no tokenizer.model or tokenizer.json; copy the checkpoint's tokenizer there")
    return opened("llava", folder, config, dims, tensors, folders)


def save_llava(
    folder: Path, name: str, dims: LlavaDims, state: Mapping[str, torch.Tensor], tokenizer: Path, dtype: torch.dtype
) -> None:
    """Write our own layout: `config.json`, `model.safetensors` with canonical names, and the tokenizer's files."""
    save(folder, "llava", _settings(dims), {key: state[key] for key in tensor_shapes(dims)}, dtype, name=name)
    copy_tokenizer(tokenizer, folder)


def save_on_packages(
    folder: Path, name: str, dims: LlavaDims, connector: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write our own layout without the packaged parts (see `packaged`); a LoRA goes to `adapter/`."""
    save(folder, "llava", _settings(dims), connector, dtype, name=name, packages=packaged.PACKAGES)


def _settings(dims: LlavaDims) -> dict[str, Any]:
    return {**dataclasses.asdict(dims), "vision": encoder_settings(dims.vision)}


def _packaged(folder: Path, config: dict[str, Any], dims: LlavaDims, trained: Tensors) -> Checkpoint:
    """Open our own layout on top of packaged parts."""
    if config["packages"] != packaged.PACKAGES:
        raise BadInput(f"{folder} was made for {config['packages']}, known are {packaged.PACKAGES}; train it anew")
    tensors = packaged.complete(trained, folder)
    check_shapes(tensors, tensor_shapes(dims), str(folder))
    source = {
        "kind": "checkpoint",
        "path": str(folder),
        "packages": packaged.PACKAGES,
        "sha256": fingerprint(folder, folder / packaged.ADAPTER),
        "licence": f"{config.get('licence', '')}; SmolLM2 Apache-2.0; MobileNetV2 MIT",
    }
    return Checkpoint("llava", str(config["name"]), dims, tensors, packaged.tokenizer(), source)


def _ours(folder: Path, config: dict[str, Any]) -> tuple[LlavaDims, Tensors]:
    if config[OURS] != "llava":
        raise BadInput(f"{folder} holds weights of {config[OURS]}, not of llava; export that system")
    try:
        data = dict(config["dims"])
        vision, language = encoder_dims(data.pop("vision")), LlamaDims(**data.pop("language"))
        data |= {key: tuple(data[key]) for key in ("mean", "std")}
        return LlavaDims(vision, language, **data), open_folder(folder)
    except (KeyError, TypeError) as error:
        raise BadInput(
            f"{folder}/config.json does not describe llava's dims ({error}); train or copy it again"
        ) from None


def _port(folder: Path) -> tuple[LlavaDims, Tensors]:
    from transformers import LlavaConfig

    try:
        config = LlavaConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(
            f"{folder}/config.json is not readable as transformers' LLaVA ({first_line(error)}); copy it again"
        ) from None
    if config.projector_hidden_act != "gelu":
        raise BadInput(f"{folder} has a projector with {config.projector_hidden_act}, which is not supported; GELU is")
    if config.vision_feature_select_strategy != "default":
        raise BadInput(f"{folder} keeps CLIP's class token, which is not supported; use a checkpoint that drops it")
    settings = config.to_dict()  # with the defaults that the file may omit
    kinds = settings["vision_config"]["model_type"], settings["text_config"]["model_type"]
    if kinds != ("clip_vision_model", "llama"):
        raise BadInput(f"{folder} is a LLaVA of {kinds[0]} and {kinds[1]}; CLIP and LLaMA are supported")
    if not isinstance(config.vision_feature_layer, int):
        raise BadInput(f"{folder} taps several layers {config.vision_feature_layer}; one is supported")
    tensors = renamed(open_folder(folder), lambda name: canonical_name(name, _PORT))
    vision = _vit(settings["vision_config"], config.vision_feature_layer)
    tied = bool(settings.get("tie_word_embeddings") or settings["text_config"].get("tie_word_embeddings"))
    language = _llama(folder, {**settings["text_config"], "tie_word_embeddings": tied}, tensors)
    fit, mean, std = _port_preprocessing(folder)
    template = "vicuna_v1_no_system"
    return LlavaDims(vision, language, fit=fit, template=template, mean=mean, std=std), tensors


def _port_preprocessing(folder: Path) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
    data: dict[str, Any] = {}
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            found = read_json(folder / file)
            data = {**data, **found, **found.get("image_processor", {})}
    fit = "pad" if data.get("do_pad") else "crop"
    return fit, tuple(data.get("image_mean", IMAGE_MEAN)), tuple(data.get("image_std", IMAGE_STD))


def open_original(
    folder: Path, config: dict[str, Any], more: tuple[tuple[str, str], ...] = ()
) -> tuple[LlavaDims, Tensors, list[Path]]:
    """The original layout: dims, tensors and source folders; `more` are rules for tensors that LLaVA lacks."""
    if config.get("mm_vision_select_feature", "patch") != "patch":
        raise BadInput(f"{folder} keeps CLIP's class token (cls_patch), which is not supported; use a patch checkpoint")
    if config.get("mm_use_im_start_end"):
        raise BadInput(
            f"{folder} marks pictures with <im_start> and <im_end> (v0), which is not supported; use v1 or v1.5"
        )
    if "anyres" in str(config.get("image_aspect_ratio")):
        raise BadInput(f"{folder} cuts pictures into tiles (anyres, v1.6), which is not supported; use v1 or v1.5")
    if "mm_vision_tower" not in config:
        raise BadInput(f"{folder}/config.json names no mm_vision_tower; copy the checkpoint's own config")
    weights, folders = _original_weights(folder)
    tensors = renamed(weights, lambda name: canonical_name(name, more + _ORIGINAL))
    tower = _beside(folder, str(config["mm_vision_tower"]))
    clip = read_json(tower / "config.json")
    if not any(name.startswith("vision_encoder.") for name in tensors):
        own = ((_VISION, r"vision_encoder.\1"),)
        tensors = merged([tensors, renamed(open_folder(tower), lambda name: canonical_name(name, own))])
    processor = read_json(path) if (path := tower / "preprocessor_config.json").is_file() else {}
    kind = config.get("mm_projector_type", "linear")
    dims = LlavaDims(
        vision=_vit(clip.get("vision_config", clip), int(config.get("mm_vision_select_layer", -2))),
        language=_llama(folder, config, tensors),
        connector=kind,
        fit="pad" if config.get("image_aspect_ratio") == "pad" else "crop",
        template=_template(folder, config, kind),
        mean=tuple(processor.get("image_mean", IMAGE_MEAN)),
        std=tuple(processor.get("image_std", IMAGE_STD)),
    )
    return dims, tensors, [*folders, tower]


def _original_weights(folder: Path) -> tuple[Tensors, list[Path]]:
    """The weights, a LoRA merged into its base (llava/model/builder.py), and their folders."""
    if not (folder / "adapter_config.json").is_file():
        return open_folder(folder), [folder]
    name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise BadInput(f"{folder}/adapter_config.json names no base_model_name_or_path; add where the base model is")
    base = _beside(folder, str(name))
    extra = folder / "non_lora_trainables.bin"
    if not extra.is_file():
        raise BadInput(f"{extra} is missing; copy the whole LoRA checkpoint")
    weights = merged([merge_lora(open_folder(base), folder), renamed(open_file(extra), _without_peft)])
    return weights, [folder, base]


def _without_peft(name: str) -> str:
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def _beside(folder: Path, name: str) -> Path:
    """A folder named relative to the checkpoint, any other path, or a hub id."""
    beside = folder / name
    return beside if beside.is_dir() else resolve_folder(name)


def _template(folder: Path, config: dict[str, Any], kind: str) -> str:
    name = f"{config.get('_name_or_path', '')} {folder.name}".lower()
    if "llama-2" in name or "llama_2" in name:
        return "llava_llama_2"
    if "v0" in name:
        return "llava_v0"
    return "llava_v1" if kind == "linear" else "vicuna_v1"


def _vit(config: Mapping[str, Any], tap: int) -> VitDims:
    """CLIP's configuration; missing fields have CLIP-B/32's defaults, as in transformers."""
    return VitDims(
        image_size=int(config.get("image_size", 224)),
        patch_size=int(config.get("patch_size", 32)),
        width=int(config.get("hidden_size", 768)),
        layers=int(config.get("num_hidden_layers", 12)),
        heads=int(config.get("num_attention_heads", 12)),
        mlp_width=int(config.get("intermediate_size", 3072)),
        tap=tap,
        eps=float(config.get("layer_norm_eps", 1e-5)),
        activation=str(config.get("hidden_act", "quick_gelu")),
    )


def _llama(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> LlamaDims:
    """LLaMA's configuration in transformers 4 or 5 spelling; the vocabulary is the embedding table's actual size."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) not in ("default", None):
        raise BadInput(f"{folder} has scaled rotary positions ({rope}), which are not supported; use a plain LLaMA")
    table = "language_model.model.embed_tokens.weight"
    if table not in tensors:
        raise BadInput(f"{folder} lacks embed_tokens.weight; give the complete checkpoint")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise BadInput(f"{folder}/config.json lacks {', '.join(missing)}; copy the checkpoint's own config")
    heads = int(config["num_attention_heads"])
    return LlamaDims(
        vocabulary=tensors.shape(table)[0],
        width=int(config["hidden_size"]),
        ffn_width=int(config["intermediate_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        context=int(config.get("max_position_embeddings", 2048)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        tied=bool(config.get("tie_word_embeddings")) and "language_model.lm_head.weight" not in tensors,
        head_width=config.get("head_dim"),
    )
