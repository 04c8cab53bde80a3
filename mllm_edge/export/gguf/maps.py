"""How a language model of each architecture stands in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from mllm_edge.errors import MllmEdgeError
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.language.llama_gguf import interleave_rotary

_ROPE = "rope_freqs.weight"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Map:
    """An architecture.

    Attributes:
        architecture: as llama.cpp calls it.
        tensor_shapes: dims -> every tensor by its name in transformers' class, in the order of the file.
        names: dims and those names -> the names in the file.
        arranged: name, weight, dims -> the weight as llama.cpp expects it.
        write_dims: puts the dims into the header.
        made: dims -> tensors of the file that are computed from them alone, by their names in the file.
    """

    architecture: str
    tensor_shapes: Callable[[Any], Shapes]
    names: Callable[[Any, Iterable[str]], dict[str, str]]
    arranged: Callable[[str, np.ndarray, Any], np.ndarray]
    write_dims: Callable[[gguf.GGUFWriter, Any], None]
    made: Callable[[Any], dict[str, np.ndarray]]


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


def _llama_names(dims: LlamaDims, names: Iterable[str]) -> dict[str, str]:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, dims.layers)
    found = {name: name if name == _ROPE else known.get_name(name, (".weight", ".bias")) for name in names}
    unknown = [name for name, gguf_name in found.items() if gguf_name is None]
    if unknown:
        raise MllmEdgeError(f"the gguf package has no name for {unknown[0]}; install gguf >= 0.19")
    return {name: str(gguf_name) for name, gguf_name in found.items()}


def _llama_arranged(name: str, weight: np.ndarray, dims: LlamaDims) -> np.ndarray:
    heads = {"q_proj": dims.heads, "k_proj": dims.kv_heads}.get(name.split(".")[-2])
    return interleave_rotary(weight, heads) if heads else weight


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


def _llama_made(dims: LlamaDims) -> dict[str, np.ndarray]:
    """What llama.cpp divides the rotary frequencies by: llama3's scaling (transformers' modeling_rope_utils.py)."""
    scaling = dims.rope_scaling or {}
    if scaling.get("rope_type") != "llama3":
        return {}
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = dims.rope_theta ** -(np.arange(0, dims.head_dim, 2) / dims.head_dim) / (2 * np.pi)  # a position
    smooth = (scaling["original_max_position_embeddings"] * turns - low) / (high - low)
    kept = np.clip(smooth, 0, 1)  # 0: slow, divided by the factor; 1: fast, as it is
    return {_ROPE: (1 / ((1 - kept) / factor + kept)).astype(np.float32)}


MAPS = {"llama": Map("llama", tensor_shapes, _llama_names, _llama_arranged, _llama_dims, _llama_made)}
