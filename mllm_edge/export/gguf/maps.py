"""How a language model of each architecture stands in a GGUF file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from mllm_edge.errors import MllmEdgeError
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.language.llama_gguf import interleave_rotary
from mllm_edge.models.language.opt import TABLE, UNUSED_POSITIONS, OptDims

_ROPE = "rope_freqs.weight"
Shapes = dict[str, tuple[int, ...]]


def _same(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Held:
    """A tensor of the file.

    Attributes:
        shape: in the file.
        parts: what it is made from: names in transformers' class, and their shapes.
        made: their arrays, float32, in order -> the tensor as llama.cpp expects it.
        float32: it is never stored in fewer bits.
    """

    shape: tuple[int, ...]
    parts: Shapes = field(default_factory=dict)
    made: Callable[..., np.ndarray] = _same
    float32: bool = False


@dataclass(frozen=True)
class Map:
    """An architecture.

    Attributes:
        architecture: as llama.cpp calls it.
        tensors: dims and quantization -> every tensor of the file by its name, in the order of the file.
        write_dims: puts the dims into the header.
    """

    architecture: str
    tensors: Callable[[Any, str], dict[str, Held]]
    write_dims: Callable[[gguf.GGUFWriter, Any], None]


def tensor_shapes(dims: LlamaDims) -> dict[str, tuple[int, ...]]:
    """Name (as in `LlamaForCausalLM`) -> shape of every tensor of the decoder."""
    query, key = dims.heads * dims.head_dim, dims.kv_width
    layer = {
        "input_layernorm.weight": (dims.width,),
        "self_attn.q_proj.weight": (query, dims.width),
        "self_attn.k_proj.weight": (key, dims.width),
        "self_attn.v_proj.weight": (key, dims.width),
        "self_attn.o_proj.weight": (dims.width, query),
        "post_attention_layernorm.weight": (dims.width,),
        "mlp.gate_proj.weight": (dims.ffn_width, dims.width),
        "mlp.up_proj.weight": (dims.ffn_width, dims.width),
        "mlp.down_proj.weight": (dims.width, dims.ffn_width),
    }
    biased = [*(["self_attn"] if dims.attention_bias else []), *(["mlp"] if dims.mlp_bias else [])]
    matrices = [name for name in layer if name.split(".")[0] in biased]
    layer |= {name.replace("weight", "bias"): layer[name][:1] for name in matrices}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (dims.vocabulary, dims.width)}
    for number in range(dims.layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (dims.width,)
    if not dims.tied:
        shapes["lm_head.weight"] = (dims.vocabulary, dims.width)
    return shapes


def _llama_tensors(dims: LlamaDims, quant: str) -> dict[str, Held]:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, dims.layers)
    turned = {"q_proj": dims.heads, "k_proj": dims.kv_heads}
    held: dict[str, Held] = {}
    for name, shape in tensor_shapes(dims).items():
        gguf_name = known.get_name(name, (".weight", ".bias"))
        if gguf_name is None:
            raise MllmEdgeError(f"the gguf package has no name for {name}; install gguf >= 0.19")
        heads = turned.get(name.split(".")[-2])
        made = functools.partial(interleave_rotary, heads=heads) if heads else _same
        held[gguf_name] = Held(shape, {name: shape}, made)
    factors = _rope_factors(dims)
    return held if factors is None else {**held, _ROPE: Held(factors.shape, made=lambda: factors)}


def _llama_dims(writer: gguf.GGUFWriter, dims: LlamaDims) -> None:
    writer.add_context_length(dims.context)
    writer.add_embedding_length(dims.width)
    writer.add_block_count(dims.layers)
    writer.add_feed_forward_length(dims.ffn_width)
    writer.add_head_count(dims.heads)
    writer.add_head_count_kv(dims.kv_heads)
    writer.add_key_length(dims.head_dim)
    writer.add_value_length(dims.head_dim)
    writer.add_rope_dimension_count(dims.head_dim)
    writer.add_rope_freq_base(dims.rope_theta)
    if dims.rope_scaling and dims.rope_scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(dims.rope_scaling["factor"])
    writer.add_layer_norm_rms_eps(dims.norm_eps)
    writer.add_vocab_size(dims.vocabulary)


def _rope_factors(dims: LlamaDims) -> np.ndarray | None:
    """What llama.cpp divides the rotary frequencies by: llama3's scaling (transformers' modeling_rope_utils.py)."""
    scaling = dims.rope_scaling or {}
    if scaling.get("rope_type") != "llama3":
        return None
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = dims.rope_theta ** -(np.arange(0, dims.head_dim, 2) / dims.head_dim) / (2 * np.pi)  # a position
    smooth = (scaling["original_max_position_embeddings"] * turns - low) / (high - low)
    kept = np.clip(smooth, 0, 1)  # 0: slow, divided by the factor; 1: fast, as it is
    return (1 / ((1 - kept) / factor + kept)).astype(np.float32)


def sharpness(quant: str) -> float:
    """How much the input of llama.cpp's GELU is scaled to make it OPT's ReLU: gelu(s x) / s is at most 0.17 / s away.

    In 16 bits s x may not pass 65504, and a large s leaves the scales of quantized blocks so small that their 16 bits
    cut them off (measured in docs/design.md).
    """
    return {"f32": 4096.0, "f16": 64.0}.get(quant, 32.0)


def opt_tensors(dims: OptDims, sharpness: float) -> dict[str, Held]:
    """OPT as llama.cpp's gpt2 (its `src/models/gpt2.cpp`): queries, keys and values are one matrix, the head is the
    table, and GELU is sharpened to ReLU."""
    home, width, wide = "model.decoder.", dims.width, dims.ffn_width
    table, positions = (dims.vocabulary, width), (dims.context, width)
    held = {
        "token_embd.weight": Held(table, {TABLE: table}),
        "position_embd.weight": Held(
            positions,
            {f"{home}embed_positions.weight": (dims.context + UNUSED_POSITIONS, width)},
            lambda rows: rows[UNUSED_POSITIONS:],
            float32=True,
        ),
        **_with_bias("output_norm", [f"{home}final_layer_norm"], (width,)),
    }
    for number in range(dims.layers):
        here, there = f"{home}layers.{number}.", f"blk.{number}."
        projections = [f"{here}self_attn.{name}_proj" for name in "qkv"]
        held |= {
            **_with_bias(f"{there}attn_norm", [f"{here}self_attn_layer_norm"], (width,)),
            **_with_bias(f"{there}attn_qkv", projections, (width, width)),
            **_with_bias(f"{there}attn_output", [f"{here}self_attn.out_proj"], (width, width)),
            **_with_bias(f"{there}ffn_norm", [f"{here}final_layer_norm"], (width,)),
            **_with_bias(f"{there}ffn_up", [f"{here}fc1"], (wide, width), sharpness, sharpness),
            **_with_bias(f"{there}ffn_down", [f"{here}fc2"], (width, wide), 1 / sharpness),
        }
    return held


def _with_bias(
    name: str, parts: Sequence[str], shape: tuple[int, ...], weight: float = 1.0, bias: float = 1.0
) -> dict[str, Held]:
    """A weight and its bias: the rows of all parts, each of `shape`, times a factor."""

    def stacked(kind: str, one: tuple[int, ...], factor: float) -> Held:
        return Held(
            (len(parts) * one[0], *one[1:]),
            {f"{part}.{kind}": one for part in parts},
            lambda *arrays: np.concatenate(arrays) * np.float32(factor),
        )

    return {f"{name}.weight": stacked("weight", shape, weight), f"{name}.bias": stacked("bias", shape[:1], bias)}


def _opt_dims(writer: gguf.GGUFWriter, dims: OptDims) -> None:
    writer.add_context_length(dims.context)
    writer.add_embedding_length(dims.width)
    writer.add_block_count(dims.layers)
    writer.add_feed_forward_length(dims.ffn_width)
    writer.add_head_count(dims.heads)
    writer.add_layer_norm_eps(1e-5)  # torch's, which OPT does not set
    writer.add_vocab_size(dims.vocabulary)


MAPS = {
    "llama": Map("llama", _llama_tensors, _llama_dims),
    "opt": Map("gpt2", lambda dims, quant: opt_tensors(dims, sharpness(quant)), _opt_dims),
}
