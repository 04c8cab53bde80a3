"""LLaVA checkpoints in every public layout, under our canonical names.

Ours (`config.json` with "system"), the original (`liuhaotian/llava-*`, LoRA included) and transformers' port
(`llava-hf/*`, old and new names).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.bundle.manifest import Prompt
from mllm_edge.checkpoints import lora
from mllm_edge.checkpoints.dequantize import open_weights, quantization
from mllm_edge.checkpoints.tensors import (
    Tensors,
    check_all_used,
    check_shapes,
    fingerprint,
    has_weights,
    open_folder,
    read_json,
    renamed,
)
from mllm_edge.errors import BadInput, first_line, look_up
from mllm_edge.models.blocks.encoders import encoder_dims, encoder_settings
from mllm_edge.models.fields import bounded, check_fixed, refuse_quantized, well_typed
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.layouts import OURS, canonical_name, copy_tokenizer, opened, save, tokenizer_of
from mllm_edge.models.llava import packaged
from mllm_edge.models.llava.conversation import choose_prompt
from mllm_edge.models.llava.dims import VISION, language_dims, vit_dims, without_effect
from mllm_edge.models.llava.model import LlavaDims, tensor_shapes
from mllm_edge.models.llava.original import Opened, beside, open_original
from mllm_edge.models.llava.pictures import read_preprocessing
from mllm_edge.models.llava.port_reference import references
from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch

# The first matching rule gives the canonical name; a tensor without a match keeps its own, and has to be accounted for.
_PORT = (
    (r"(?:model\.)?vision_tower\." + VISION, r"vision_encoder.\1"),
    (r"(?:model\.)?multi_modal_projector\.linear_1\.", "connector.0."),
    (r"(?:model\.)?multi_modal_projector\.linear_2\.", "connector.2."),
    (
        r"(?:language_model\.|model\.language_model\.)(?:model\.)?(embed_tokens|layers|norm)\.",
        r"language_model.model.\1.",
    ),
    (r"(?:language_model\.)?lm_head\.", "language_model.lm_head."),
)
_PORT_FIXED: dict[str, tuple[Any, ...]] = {
    "projector_hidden_act": ("gelu",),
    "vision_feature_select_strategy": ("default",),
    "multimodal_projector_bias": (None, True),
}


def load(folder: Path) -> Checkpoint:
    """Detect a folder's layout and open it.

    Raises:
        BadInput: not LLaVA (names its model type), an unsupported option of LLaVA, missing, misshapen or unknown
            tensors, no tokenizer.
    """
    home = folder if (folder / "config.json").is_file() else _base_of_adapter(folder)
    config = read_json(home / "config.json")
    kind = config.get("model_type")
    if OURS in config:
        refuse_quantized(config, home / "config.json")
        dims, tensors = _ours(folder, config)
        if "packages" in config:
            return _packaged(folder, config, dims, tensors)
        check_shapes(tensors, tensor_shapes(dims), str(folder))
        check_all_used(tensors, tensor_shapes(dims), {}, str(folder))
        return opened("llava", folder, config, dims, tensors, [folder], tokenizer_of([folder]))
    if "text_config" in config and kind == "llava":
        found, usual, why = _port(folder, home), "vicuna_v1_no_system", "the usual one of transformers' layout"
    elif kind in ("llava", "llava_llama"):
        found = open_original(folder, config)
        usual = "llava_v1" if found.dims.connector == "linear" else "vicuna_v1"
        why = "the usual one of this generation of LLaVA"
    else:
        raise BadInput(f"{folder} is a {kind or 'nameless'} checkpoint, not LLaVA; give a LLaVA checkpoint")
    shapes = tensor_shapes(found.dims)
    check_shapes(found.tensors, shapes, str(folder))
    check_all_used(found.tensors, shapes, without_effect(found.dims.vision), str(folder))
    tokenizer = tokenizer_of(found.folders)

    def prompt() -> tuple[Prompt, str]:
        return choose_prompt(found.folders, config, usual, why, tokenizer)

    dims = replace(found.dims, template=usual)
    folders = list(dict.fromkeys([*found.folders, found.tower]))
    checkpoint = opened("llava", folder, config, dims, found.tensors, folders, tokenizer, prompt)
    return replace(checkpoint, references=found.references)


def save_llava(
    folder: Path, name: str, dims: LlavaDims, state: Mapping[str, torch.Tensor], tokenizer: Path, dtype: torch.dtype
) -> None:
    """Write our own layout: `config.json`, `model.safetensors` with canonical names, and the tokenizer's files."""
    save(folder, "llava", llava_settings(dims), {key: state[key] for key in tensor_shapes(dims)}, dtype, name=name)
    copy_tokenizer(tokenizer, folder)


def save_on_packages(
    folder: Path, name: str, dims: LlavaDims, connector: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write our own layout without the packaged parts (see `packaged`); a LoRA goes to `adapter/`."""
    save(folder, "llava", llava_settings(dims), connector, dtype, name=name, packages=packaged.PACKAGES)


def llava_settings(dims: LlavaDims) -> dict[str, Any]:
    """Dims as our own layout's config.json has them."""
    settings = {**dataclasses.asdict(dims), "vision": encoder_settings(dims.vision)}
    return settings if dims.tokens else {key: value for key, value in settings.items() if key != "tokens"}


def _packaged(folder: Path, config: dict[str, Any], dims: LlavaDims, trained: Tensors) -> Checkpoint:
    """Open our own layout on top of packaged parts."""
    if config["packages"] != packaged.PACKAGES:
        raise BadInput(f"{folder} was made for {config['packages']}, known are {packaged.PACKAGES}; train it anew")
    check_all_used(trained, tensor_shapes(dims), {}, str(folder))
    tensors = packaged.complete(trained, folder)
    check_shapes(tensors, tensor_shapes(dims), str(folder))
    source = {
        "kind": "checkpoint",
        "path": str(folder),
        "packages": packaged.PACKAGES,
        "sha256": fingerprint(folder, folder / packaged.ADAPTER),
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "licence": f"{config.get('licence', '')}; SmolLM2 Apache-2.0; MobileNetV2 MIT",
    }
    return Checkpoint("llava", str(config["name"]), dims, tensors, packaged.tokenizer(), source)


def _ours(folder: Path, config: dict[str, Any]) -> tuple[LlavaDims, Tensors]:
    if config[OURS] != "llava":
        raise BadInput(f"{folder} holds weights of {config[OURS]}, not of llava; export that system")
    bounded(config.get("dims"), folder / "config.json")
    try:
        data = dict(config["dims"])
        vision, language = encoder_dims(data.pop("vision")), LlamaDims(**data.pop("language"))
        data |= {key: tuple(data[key]) for key in ("mean", "std")}
        dims = LlavaDims(vision, language, **data)
        well_typed(dims, folder / "config.json")
        look_up("template", dims.template, PROMPTS)
        return dims, open_folder(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{folder}/config.json does not describe llava's dims ({error}); train or copy it again"
        ) from None


def _base_of_adapter(folder: Path) -> Path:
    """The base of a folder that holds an adapter and nothing else, as peft saves it."""
    return beside(folder, lora.base_of(folder)) if (folder / lora.CONFIG).is_file() else folder


def _port(folder: Path, home: Path) -> Opened:
    """transformers' layout in `home`; an adapter in `folder` is merged, as transformers does."""
    from transformers import LlavaConfig

    where = home / "config.json"
    try:
        config = LlavaConfig.from_pretrained(str(home), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadInput(f"{where} is not readable as transformers' LLaVA ({first_line(error)}); copy it again") from None
    settings = config.to_dict()  # with the defaults that the file may omit
    check_fixed(settings, _PORT_FIXED, where)
    text, eyes = settings["text_config"], settings["vision_config"]
    if (eyes["model_type"], text["model_type"]) != ("clip_vision_model", "llama"):
        raise BadInput(
            f"{home} is a LLaVA of {eyes['model_type']} and {text['model_type']}; CLIP and LLaMA are supported"
        )
    weights, folders, plain = _port_weights(folder, home)
    vision = vit_dims(eyes, config.vision_feature_layer, where)
    tied = bool(settings.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    language = language_dims({**text, "tie_word_embeddings": tied}, weights, where)
    pixels = read_preprocessing(home, vision.image_size)
    dims = LlavaDims(vision, language, fit=pixels.fit, resample=pixels.resample, mean=pixels.mean, std=pixels.std)
    if plain is None:
        return Opened(dims, weights, folders, home)
    numbers = plain if quantization(read_json(where)) else None
    return Opened(dims, weights, folders, home, references(config, home, language.vocabulary, numbers))


def _port_weights(folder: Path, home: Path) -> tuple[Tensors, list[Path], Tensors | None]:
    """The weights, their folders and, where no adapter changes them, the weights under their own names."""
    folders = list(dict.fromkeys([folder, home]))
    adapted = (folder / lora.CONFIG).is_file()
    if adapted and not has_weights(home):
        base = beside(folder, lora.base_of(folder))
        folders.append(base)
        weights = open_weights(base, read_json(base / "config.json"))
    else:
        weights = open_weights(home, read_json(home / "config.json"))
    named = renamed(weights, _port_name)
    if adapted:
        return lora.merge_lora(named, folder, _port_name), folders, None
    return named, folders, weights


def _port_name(name: str) -> str:
    return canonical_name(name, _PORT) or name
