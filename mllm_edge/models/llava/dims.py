"""Shared by the layouts of LLaVA's checkpoints: dims from their fields, and the tensors that have no effect."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_edge.checkpoints.tensors import Tensors
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.encoders import EncoderDims
from mllm_edge.models.blocks.vit import ACTIVATIONS, VitDims
from mllm_edge.models.fields import MOST_LAYERS, check_fixed, real, whole
from mllm_edge.models.language.config import llama_dims
from mllm_edge.models.language.llama import LlamaDims

VISION = r"(?:vision_model\.)?(embeddings\.|pre_layrnorm\.|encoder\.layers\.)"  # sic: the published name
_CLIP_FIXED = {"hidden_act": (None, *ACTIVATIONS), "num_channels": (None, 3)}


def vit_dims(config: Mapping[str, Any], tap: object, where: Path) -> VitDims:
    """CLIP's configuration; missing fields have CLIP-B/32's defaults, as in transformers.

    Raises:
        BadInput: a field (named, with its value) that is not supported, or a tap that is no layer.
    """
    check_fixed(config, _CLIP_FIXED, where)
    layers = whole(config, "num_hidden_layers", where, 12, MOST_LAYERS)
    if not isinstance(tap, int) or not -layers - 1 <= tap <= layers:
        raise BadInput(f"{where} has {layers} vision layers, so that none is tapped at {tap!r}; one layer is needed")
    dims = VitDims(
        image_size=whole(config, "image_size", where, 224),
        patch_size=whole(config, "patch_size", where, 32),
        width=whole(config, "hidden_size", where, 768),
        layers=layers,
        heads=whole(config, "num_attention_heads", where, 12),
        mlp_width=whole(config, "intermediate_size", where, 3072),
        tap=tap,
        eps=real(config, "layer_norm_eps", where, 1e-5),
        activation=str(config.get("hidden_act") or "quick_gelu"),
    )
    if dims.patch_size > dims.image_size or dims.width % dims.heads:
        raise BadInput(f"{where} has a CLIP whose patches or heads do not fit its size; copy it again")
    return dims


def language_dims(config: Mapping[str, Any], tensors: Tensors, where: Path) -> LlamaDims:
    """The decoder's; the vocabulary is the embedding table's actual size. Raises BadInput as `llama_dims` does."""
    table = "language_model.model.embed_tokens.weight"
    if table not in tensors:
        raise BadInput(f"{where.parent} lacks embed_tokens.weight; give the complete checkpoint")
    return llama_dims(config, tensors.shape(table)[0], "language_model.lm_head.weight" in tensors, where)


def connector_kind(tensors: Tensors) -> str:
    """The kind of connector that the tensors are of, for a config that does not say it."""
    numbers = {int(found[1]) for name in tensors if (found := re.match(r"connector\.(\d{1,3})\.", name))}
    return "linear" if len(numbers) < 2 else f"mlp{len(numbers)}x_gelu"


def without_effect(vision: EncoderDims) -> dict[str, str]:
    """Patterns of the tensors that a LLaVA does not use, each with the reason (see `check_all_used`)."""
    tower = r"(?:(?:model\.)?vision_tower\.(?:vision_tower\.)?)?(?:vision_model\.)?"
    reasons = {
        r"(?:.*\.)?rotary_emb\.inv_freq": "computed from rope_theta",
        r"(?:.*\.)?position_ids": "counts up",
        tower + r"post_layernorm\.(?:weight|bias)": "after the tapped layer",
        r"text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale": "CLIP's half for text",
    }
    if isinstance(vision, VitDims):
        late = "|".join(map(str, range(vision.depth, vision.layers)))
        reasons[rf"vision_encoder\.encoder\.layers\.(?:{late})\..*"] = "after the tapped layer"
    return reasons
