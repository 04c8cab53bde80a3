"""LLaMA's dims from the fields of a config.json, in the spelling of transformers 4 or 5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllm_edge.errors import BadInput
from mllm_edge.models.fields import MOST_LAYERS, check_fixed, flag, real, whole
from mllm_edge.models.language.llama import LlamaDims

# Of LLaMA and of its relatives, which differ from it by such a field.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "use_sliding_window": (None, False),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "clip_qkv": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "alibi": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0, 1),
    "no_rope_layers": (None, []),
}
_SCALED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def llama_dims(config: Mapping[str, Any], vocabulary: int, has_head: bool, where: Path) -> LlamaDims:
    """Dims of a LLaMA.

    Args:
        config: the decoder's fields; those that are left out have transformers' defaults.
        vocabulary: the embedding table's actual rows.
        has_head: whether the checkpoint holds a head.
        where: the file of the fields.

    Raises:
        BadInput: a field (named, with its value) that a LLaMA in llama.cpp cannot have.
    """
    check_fixed(config, _FIXED, where)
    context = whole(config, "max_position_embeddings", where, 2048)
    window = whole(config, "sliding_window", where, context)
    if window < context and config.get("use_sliding_window") is None:
        raise BadInput(f"{where} has sliding_window {window}, which is not supported; use another checkpoint")
    others = sorted({str(kind) for kind in config.get("layer_types") or []} - {"full_attention"})
    if others:
        raise BadInput(f"{where} has layer_types {others[0]!r}, which are not supported; use another checkpoint")
    heads = whole(config, "num_attention_heads", where)
    width = whole(config, "hidden_size", where)
    theta, scaling = _rope(config, where)
    return LlamaDims(
        vocabulary=vocabulary,
        width=width,
        ffn_width=whole(config, "intermediate_size", where),
        layers=whole(config, "num_hidden_layers", where, most=MOST_LAYERS),
        heads=heads,
        kv_heads=whole(config, "num_key_value_heads", where, heads),
        context=context,
        norm_eps=real(config, "rms_norm_eps", where, 1e-6),
        rope_theta=theta,
        tied=flag(config, "tie_word_embeddings", where) and not has_head,
        head_width=whole(config, "head_dim", where, width // heads) if config.get("head_dim") else None,
        attention_bias=flag(config, "attention_bias", where),
        mlp_bias=flag(config, "mlp_bias", where),
        rope_scaling=scaling,
    )


def _rope(config: Mapping[str, Any], where: Path) -> tuple[float, dict[str, Any] | None]:
    """The base of rotary positions, and how they are scaled, if they are."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise BadInput(f"{where} has rope_scaling {rope!r}, which is no object; copy it again")
    check_fixed(rope, {"partial_rotary_factor": (None, 1)}, where)
    theta = real(rope, "rope_theta", where, real(config, "rope_theta", where, 10000.0))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in _SCALED:
        raise BadInput(
            f"{where} has rope_scaling {kind!r}, which is not supported ({' and '.join(_SCALED)} are); "
            "use another checkpoint"
        )
    numbers = {key: real(rope, key, where) for key in _SCALED[kind]}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise BadInput(f"{where} has rope_scaling with high_freq_factor not above low_freq_factor; copy it again")
    return theta, {"rope_type": kind, **numbers}
