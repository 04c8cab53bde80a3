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
    """

    architecture: str
    tensor_shapes: Callable[[Any], Shapes]
    names: Callable[[Any, Iterable[str]], dict[str, str]]
    arranged: Callable[[str, np.ndarray, Any], np.ndarray]
    write_dims: Callable[[gguf.GGUFWriter, Any], None]


def tensor_shapes(dims: LlamaDims) -> dict[str, tuple[int, ...]]:
    """Name (as in `LlamaForCausalLM`) -> shape of every tensor of the decoder."""
    query, key = dims.heads * dims.head_dim, dims.kv_width
    layer = {
        "input_layernorm": (dims.width,),
        "self_attn.q_proj": (query, dims.width),
        "self_attn.k_proj": (key, dims.width),
        "self_attn.v_proj": (key, dims.width),
        "self_attn.o_proj": (dims.width, query),
        "post_attention_layernorm": (dims.width,),
        "mlp.gate_proj": (dims.ffn_width, dims.width),
        "mlp.up_proj": (dims.ffn_width, dims.width),
        "mlp.down_proj": (dims.width, dims.ffn_width),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (dims.vocabulary, dims.width)}
    for number in range(dims.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (dims.width,)
    if not dims.tied:
        shapes["lm_head.weight"] = (dims.vocabulary, dims.width)
    return shapes


def _llama_names(dims: LlamaDims, names: Iterable[str]) -> dict[str, str]:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, dims.layers)
    found = {name: known.get_name(name, (".weight",)) for name in names}
    unknown = [name for name, gguf_name in found.items() if gguf_name is None]
    if unknown:
        raise MllmEdgeError(f"the gguf package has no name for {unknown[0]}; install gguf >= 0.19")
    return {name: str(gguf_name) for name, gguf_name in found.items()}


def _llama_arranged(name: str, weight: np.ndarray, dims: LlamaDims) -> np.ndarray:
    heads = {"q_proj.weight": dims.heads, "k_proj.weight": dims.kv_heads}.get(".".join(name.split(".")[-2:]))
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
    writer.add_layer_norm_rms_eps(dims.norm_eps)
    writer.add_vocab_size(dims.vocabulary)


MAPS = {"llama": Map("llama", tensor_shapes, _llama_names, _llama_arranged, _llama_dims)}
