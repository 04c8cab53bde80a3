"""LLaVA's original layout (`liuhaotian/llava-*`): whole, as a LoRA, or as a projector alone, with CLIP beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints import lora
from mllm_edge.checkpoints.dequantize import open_weights
from mllm_edge.checkpoints.tensors import (
    Tensors,
    has_weights,
    merged,
    open_file,
    open_folder,
    read_json,
    renamed,
    resolve_folder,
)
from mllm_edge.errors import BadInput
from mllm_edge.models.fields import check_fixed, flag, refuse_quantized
from mllm_edge.models.layouts import canonical_name
from mllm_edge.models.llava.dims import VISION, connector_kind, language_dims, vit_dims
from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.llava.pictures import read_preprocessing

if TYPE_CHECKING:
    import torch

Rules = tuple[tuple[str, str], ...]
RULES: Rules = (
    (r"model\.vision_tower\.vision_tower\." + VISION, r"vision_encoder.\1"),
    (r"model\.mm_projector\.(\d)", r"connector.\1"),
    (r"model\.mm_projector\.(weight|bias)", r"connector.0.\1"),
    (r"(model\.(?:embed_tokens|layers|norm)\.|lm_head\.)", r"language_model.\1"),
)
_TOWER: Rules = ((VISION, r"vision_encoder.\1"),)
_FIXED: dict[str, tuple[Any, ...]] = {
    "mm_vision_select_feature": (None, "patch"),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_patch_merge_type": (None, "flat"),
    "mm_resampler_type": (None,),
    "s2": (None, False),
}
EXTRA, PROJECTOR = "non_lora_trainables.bin", "mm_projector.bin"


@dataclass(frozen=True)
class Opened:
    """Dims and tensors (what has no canonical name keeps its own), and the folders that they come from: the
    checkpoint's own, that of its base where it has one, and the vision tower's. `references` as a `Checkpoint` has
    them."""

    dims: LlavaDims
    tensors: Tensors
    folders: list[Path]
    tower: Path
    references: Mapping[str, Callable[[], torch.nn.Module]] = field(default_factory=dict)


def open_original(folder: Path, config: Mapping[str, Any], more: Rules = ()) -> Opened:
    """Open the original layout.

    Args:
        folder: the checkpoint.
        config: its config.json.
        more: rules for tensors that LLaVA lacks.

    Raises:
        BadInput: a field (named, with its value) that is not supported, or files that are missing.
    """
    where = folder / "config.json"
    check_fixed(config, _FIXED, where)
    if "mm_vision_tower" not in config:
        raise BadInput(f"{where} names no mm_vision_tower; copy the checkpoint's own config")
    weights, folders = _weights(folder, config)
    tensors = renamed(weights, lambda name: canonical_name(name, more + RULES) or name)
    tower = beside(folder, str(config["mm_vision_tower"]))
    clip = read_json(tower / "config.json")
    refuse_quantized(clip, tower / "config.json")
    if not any(name.startswith("vision_encoder.") for name in tensors):
        eyes = renamed(open_folder(tower), lambda name: canonical_name(name, _TOWER) or name)
        tensors = merged([eyes, tensors])
    tap = config.get("mm_vision_select_layer", -2)
    vision = vit_dims(clip.get("vision_config", clip), tap, tower / "config.json")
    pixels = read_preprocessing(tower, vision.image_size, "pad" if config.get("image_aspect_ratio") == "pad" else "")
    dims = LlavaDims(
        vision=vision,
        language=language_dims(config, tensors, where),
        connector=str(config.get("mm_projector_type") or connector_kind(tensors)),
        fit=pixels.fit,
        resample=pixels.resample,
        mean=pixels.mean,
        std=pixels.std,
        marked=flag(config, "mm_use_im_start_end", where),
    )
    return Opened(dims, tensors, folders, tower)


def beside(folder: Path, name: str) -> Path:
    """A folder named relative to the checkpoint, any other path, or a hub id."""
    near = folder / name
    return near.absolute() if near.is_dir() else resolve_folder(name)


def _weights(folder: Path, config: Mapping[str, Any]) -> tuple[Tensors, list[Path]]:
    """The weights, put together as llava/model/builder.py does, and their folders."""
    if (folder / lora.CONFIG).is_file():
        base = beside(folder, lora.base_of(folder))
        if not (folder / EXTRA).is_file():
            raise BadInput(f"{folder / EXTRA} is missing; copy the whole LoRA checkpoint")
        extra = _without_peft(open_file(folder / EXTRA))
        return lora.merge_lora(merged([_base(base), extra]), folder), [folder, base]
    if not has_weights(folder) and (folder / PROJECTOR).is_file():
        name = config.get("_name_or_path")
        if not name:
            raise BadInput(f"{folder / 'config.json'} has no _name_or_path; write there where the base model is")
        base = beside(folder, str(name))
        if base == folder:
            raise BadInput(f"{folder} has a projector alone; write its base model as _name_or_path in its config.json")
        return merged([_base(base), open_file(folder / PROJECTOR)]), [folder, base]
    return open_weights(folder, config), [folder]


def _base(folder: Path) -> Tensors:
    return open_weights(folder, read_json(folder / "config.json"))


def _without_peft(extra: Tensors) -> Tensors:
    """`non_lora_trainables.bin` under the names of the model that the LoRA is around."""
    bare = renamed(extra, lambda name: name.removeprefix("base_model."))
    if any(name.startswith("model.model.") for name in bare):
        return renamed(bare, lambda name: name.removeprefix("model."))
    return bare
