"""GLaMM checkpoints in both layouts, ours and the published `GLaMM-*` one, and SAM's own files."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints.tensors import (
    Tensors,
    check_all_used,
    check_shapes,
    open_file,
    open_folder,
    read_json,
    renamed,
)
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.encoders import encoder_dims
from mllm_edge.models.blocks.region import RegionDims
from mllm_edge.models.blocks.sam import SamDims
from mllm_edge.models.blocks.sam_decoder import MaskDecoderDims
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.fields import bounded, refuse_quantized, well_typed
from mllm_edge.models.glamm.model import ADDED, GlammDims, tensor_shapes
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.layouts import OURS, canonical_name, copy_tokenizer, opened, save, tokenizer_of
from mllm_edge.models.llava.dims import without_effect
from mllm_edge.models.llava.layouts import llava_settings
from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.llava.original import open_original
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch

# What GLaMM does not use of SAM: masks as prompts, the IoU head, the other masks of the multi-mask output.
_UNUSED = r"(?!.*(?:mask_downscaling|iou_prediction_head|output_hypernetworks_mlps\.[1-9]))"
_WITHOUT_EFFECT = {
    r"model\.grounding_encoder\..*mask_downscaling\..*": "masks as prompts",
    r"model\.grounding_encoder\..*iou_prediction_head\..*": "how good SAM thinks its mask is",
    r"model\.grounding_encoder\..*output_hypernetworks_mlps\.[1-9]\..*": "the other masks of the multi-mask output",
    r"model\.grounding_encoder\.pixel_(?:mean|std)": "stands in the preprocessing",
}
_SAM = (
    (_UNUSED + r"(?:image|mask)_encoder\.", "mask_encoder."),
    (_UNUSED + r"(prompt_encoder|mask_decoder)\.", r"mask_head.\1."),
)
_GROUNDING = (
    (_UNUSED + r"model\.grounding_encoder\.image_encoder\.", "mask_encoder."),
    (_UNUSED + r"model\.grounding_encoder\.(prompt_encoder|mask_decoder)\.", r"mask_head.\1."),
    (r"model\.text_hidden_fcs\.0\.", "mask_head.projection."),
    (r"model\.region_encoder\.", "region_encoder."),
)


def load(folder: Path) -> Checkpoint:
    """Detect a folder's layout and open it.

    Raises:
        BadInput: not GLaMM (what it is instead is named), missing or misfit tensors.
    """
    config = read_json(folder / "config.json")
    folders, unused = [folder], dict[str, str]()
    if OURS in config:
        refuse_quantized(config, folder / "config.json")
        dims, tensors = _ours(folder, config)
    else:
        dims, tensors, folders = _published(folder, config)
        unused = {**without_effect(dims.llava.vision), **_WITHOUT_EFFECT}
    check_shapes(tensors, tensor_shapes(dims), str(folder))
    check_all_used(tensors, tensor_shapes(dims), unused, str(folder))
    return opened("glamm", folder, config, dims, tensors, folders, tokenizer_of(folders))


def save_glamm(
    folder: Path, name: str, dims: GlammDims, state: Mapping[str, torch.Tensor], tokenizer: Path, dtype: torch.dtype
) -> None:
    """Write our own layout: `config.json`, `model.safetensors` with canonical names, LLaVA's tokenizer with GLaMM's
    tokens after its own."""
    shape = dataclasses.asdict(dims)
    shape["llava"] = llava_settings(dims.llava)
    save(folder, "glamm", shape, {key: state[key] for key in tensor_shapes(dims)}, dtype, name=name)
    copy_tokenizer(tokenizer, folder)
    added = {token: dims.added_id(token) for token in ADDED}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2) + "\n", encoding="utf-8")


def read_sam(path: Path) -> dict[str, torch.Tensor]:
    """SAM in fp32 under our names, from the folder of a run of `sam-pretrain` or a file in SAM's own layout
    (`sam_vit_h_4b8939.pth`).

    Raises:
        BadInput: there is none, or it is not SAM.
    """
    file = path / "sam.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise BadInput(f"{file} is missing; run the recipe sam-pretrain first, or give SAM's checkpoint file")
    tensors = renamed(open_file(file), lambda name: canonical_name(name, _SAM))
    if not any(name.startswith("mask_encoder.") for name in tensors):
        raise BadInput(f"{file} holds no SAM (there is no image_encoder in it); give SAM's checkpoint file")
    return {name: tensors[name].float() for name in tensors}


def _ours(folder: Path, config: dict[str, Any]) -> tuple[GlammDims, Tensors]:
    if config[OURS] != "glamm":
        raise BadInput(f"{folder} holds weights of {config[OURS]}, not of glamm; export that system")
    bounded(config.get("dims"), folder / "config.json")
    try:
        data = dict(config["dims"])
        llava = dict(data["llava"])
        llava |= {key: tuple(llava[key]) for key in ("mean", "std")}
        llava["vision"], llava["language"] = encoder_dims(llava["vision"]), LlamaDims(**llava["language"])
        encoder, region = data["mask_encoder"], data["region"]
        dims = GlammDims(
            LlavaDims(**llava),
            tuple(data["taps"]),
            SamDims(**{**encoder, "global_layers": tuple(encoder["global_layers"])}),
            MaskDecoderDims(**data["mask_decoder"]),
            RegionDims(**{**region, "strides": tuple(region["strides"])}),
        )
        well_typed(dims, folder / "config.json")
        return dims, open_folder(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder}/config.json does not describe glamm's dims ({error}); train or copy it again"
        ) from None


def _published(folder: Path, config: dict[str, Any]) -> tuple[GlammDims, Tensors, list[Path]]:
    """`MBZUAI/GLaMM-*`: LLaVA's names, SAM below `grounding_encoder`, and CLIP from where the config says."""
    tower = config.get("mm_vision_tower") or config.get("vision_tower")
    held = open_folder(folder)
    if not any(name.startswith("model.grounding_encoder.") for name in held) or not tower:
        kind = config.get("model_type") or "nameless"
        raise BadInput(
            f"{folder} is a {kind} checkpoint without a grounding encoder, not GLaMM; give a GLaMM checkpoint"
        )
    settings = {**config, "mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False}
    found = open_original(folder, settings, _GROUNDING)
    llava, tensors, folders = found.dims, found.tensors, [*found.folders, found.tower]
    assert isinstance(llava.vision, VitDims)
    last = llava.vision.layers - 1  # hidden state -2, and every third before it
    taps = tuple(range(last - 9, last + 1, 3))
    try:
        sam, decoder, region = _sam_dims(tensors), _decoder_dims(tensors), _region_dims(tensors)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{folder} lacks tensors of SAM or of the region encoder ({error}); give all of it") from None
    llava = dataclasses.replace(llava, fit="crop", template="glamm")
    return GlammDims(llava, taps, sam, decoder, region), tensors, folders


def _sam_dims(tensors: Tensors) -> SamDims:
    """Every dim of SAM's encoder shows in the shape of a tensor."""
    width, _, patch, _ = tensors.shape("mask_encoder.patch_embed.proj.weight")
    grid = tensors.shape("mask_encoder.pos_embed")[1]
    layers = _count(tensors, r"mask_encoder\.blocks\.(\d+)\.")
    reach = [tensors.shape(f"mask_encoder.blocks.{i}.attn.rel_pos_h") for i in range(layers)]
    return SamDims(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        layers=layers,
        heads=width // reach[0][1],
        mlp_width=tensors.shape("mask_encoder.blocks.0.mlp.lin1.weight")[0],
        window=(min(length for length, _ in reach) + 1) // 2,
        global_layers=tuple(i for i, (length, _) in enumerate(reach) if length == 2 * grid - 1),
        out_width=tensors.shape("mask_encoder.neck.0.weight")[0],
    )


def _decoder_dims(tensors: Tensors) -> MaskDecoderDims:
    prefix = "mask_head.mask_decoder.transformer.layers."
    return MaskDecoderDims(
        grid=tensors.shape("mask_encoder.pos_embed")[1],
        width=tensors.shape("mask_encoder.neck.0.weight")[0],
        mlp_width=tensors.shape(f"{prefix}0.mlp.lin1.weight")[0],
        depth=_count(tensors, re.escape(prefix) + r"(\d+)\."),
    )


def _region_dims(tensors: Tensors) -> RegionDims:
    middle, flat = tensors.shape("region_encoder.roi_align.flatten_linear.weight")
    width = tensors.shape("region_encoder.mlvl_fuse.input_conv.0.weight")[0]
    return RegionDims(
        width,
        middle,
        position_width=tensors.shape("region_encoder.roi_align.pos_embedd.0.weight")[0],
        rounds=_count(tensors, r"region_encoder\.mlvl_fuse\.fuse_convs\.(\d+)\."),
        bins=math.isqrt(flat // width),
    )


def _count(tensors: Tensors, pattern: str) -> int:
    return 1 + max(int(found.group(1)) for name in tensors if (found := re.match(pattern, name)))
