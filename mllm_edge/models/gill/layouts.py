"""GILL in our own layout and its authors' (`original.py`).

In ours everything that a bundle needs is in one folder: the tokenizer with the picture tokens, the decoder half of the
autoencoder, and what the diffusion model reads for an empty prompt in place of its text encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.checkpoints.tensors import check_all_used, check_shapes, open_folder, read_json
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.unet import UNetDims
from mllm_edge.models.blocks.vae import VaeDims
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.fields import bounded, refuse_quantized, well_typed
from mllm_edge.models.gill.heads import MapperDims
from mllm_edge.models.gill.model import GillDims, tensor_shapes
from mllm_edge.models.gill.original import WITHOUT_EFFECT, check_fitting, is_original, open_original
from mllm_edge.models.language.opt import OptDims
from mllm_edge.models.layouts import OURS, copy_tokenizer, opened, save, tokenizer_of
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    import torch


def load(folder: Path) -> Checkpoint:
    """Open a folder in one of the layouts.

    Raises:
        BadInput: not GILL (what it is instead is named), a base that is missing, missing or misfit tensors.
    """
    if is_original(folder):
        found = open_original(folder)
        check_shapes(found.tensors, tensor_shapes(found.dims), str(folder))
        check_all_used(found.tensors, tensor_shapes(found.dims), WITHOUT_EFFECT, str(folder))
        return opened("gill", folder, {}, found.dims, found.tensors, found.folders, found.tokenizer)
    config = read_json(folder / "config.json")
    if config.get(OURS) != "gill":
        raise BadInput(f"{folder} holds no GILL, neither in our layout nor its authors'; give a checkpoint's folder")
    refuse_quantized(config, folder / "config.json")
    dims, tensors = _dims(config, folder / "config.json"), open_folder(folder)
    check_shapes(tensors, tensor_shapes(dims), str(folder))
    check_all_used(tensors, tensor_shapes(dims), {}, str(folder))
    return opened("gill", folder, config, dims, tensors, [folder], tokenizer_of([folder]))


def save_gill(
    folder: Path, name: str, dims: GillDims, state: Mapping[str, torch.Tensor], tokenizer: Path, dtype: torch.dtype
) -> None:
    """Write our own layout from tensors under the names of `tensor_shapes`, with the tokenizer of a folder."""
    save(folder, "gill", dataclasses.asdict(dims), {key: state[key] for key in tensor_shapes(dims)}, dtype, name=name)
    copy_tokenizer(tokenizer, folder)


def _dims(config: Mapping[str, Any], where: Path) -> GillDims:
    bounded(config.get("dims"), where)
    try:
        data = dict(config["dims"])
        unet, vae = dict(data.pop("unet")), dict(data.pop("vae"))
        unet |= {key: tuple(unet[key]) for key in ("widths", "attends", "heads")}
        dims = GillDims(
            VitDims(**data.pop("vision")),
            OptDims(**data.pop("language")),
            MapperDims(**data.pop("mapper")),
            UNetDims(**unet),
            VaeDims(**{**vae, "widths": tuple(vae["widths"])}),
            **data,
        )
        well_typed(dims, where)
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where} does not describe gill's dims ({error}); train or copy it again") from None
    check_fitting(dims, where)
    return dims
