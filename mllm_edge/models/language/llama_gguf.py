"""Reads a LLaMA from a GGUF file, one tensor at a time, with names and layout of `LlamaForCausalLM`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_edge.checkpoints.tensors import Tensors
from mllm_edge.errors import BadInput
from mllm_edge.models.language.llama import LlamaDims

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
}
_CONTROL, _USER_DEFINED = 3, 4


def open_gguf(path: Path) -> tuple[LlamaDims, Tensors]:
    """The dims and weights of a LLaMA in a GGUF file; quantized weights are dequantized to float32.

    Raises:
        BadInput: not a GGUF file, another architecture, or tensors that a LLaMA does not have.
    """
    from gguf import dequantize

    reader = _read(path)
    dims = _dims(path, reader)
    found = {_name(path, tensor.name): tensor for tensor in reader.tensors}

    def get(name: str) -> Tensor:
        tensor = found[name]
        weight = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        heads = {"q_proj": dims.heads, "k_proj": dims.kv_heads}.get(name.split(".")[-2])
        return torch.from_numpy(half_rotary(weight, heads) if heads else weight)

    return dims, Tensors(list(found), get, lambda name: tuple(int(n) for n in reversed(found[name].shape)))


def write_tokenizer(path: Path, folder: Path) -> None:
    """Write the byte-level BPE of a GGUF file as `tokenizer.json` and `tokenizer_config.json` into `folder`.

    Raises:
        BadInput: another kind of tokenizer (named).
    """
    reader = _read(path)
    kind, pre = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise BadInput(f"{path} has a {kind} tokenizer of kind {pre}; {', '.join(_PRE_TOKENIZERS)} can be read")
    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], **flags, "special": kind == _CONTROL}
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    data = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _value(reader, "tokenizer.ggml.merges"),
        },
    }
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: _value(reader, f"tokenizer.ggml.{name}_token_id", None) for role, name in roles.items()}
    config = {role: tokens[i] for role, i in ids.items() if i is not None}
    config["add_bos_token"] = bool(_value(reader, "tokenizer.ggml.add_bos_token", False))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise BadInput(f"{path} is not a readable GGUF file ({error}); copy it again") from None


_NEEDED = object()


def _value(reader: Any, key: str, default: Any = _NEEDED) -> Any:
    field = reader.get_field(key)
    if field is not None:
        return field.contents()
    if default is _NEEDED:
        raise BadInput(f"the GGUF file has no {key}; it is not a whole model")
    return default


def _dims(path: Path, reader: Any) -> LlamaDims:
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise BadInput(f"{path} is of architecture {architecture}; llama is supported")
    heads = _value(reader, "llama.attention.head_count")
    width = _value(reader, "llama.embedding_length")
    scaling = _value(reader, "llama.rope.scaling.type", "none")
    names = [tensor.name for tensor in reader.tensors]
    if scaling != "none" or "rope_freqs.weight" in names:
        raise BadInput(f"{path} has scaled rotary positions, which are read from Hugging Face's layout; give that")
    return LlamaDims(
        vocabulary=len(_value(reader, "tokenizer.ggml.tokens")),
        width=width,
        ffn_width=_value(reader, "llama.feed_forward_length"),
        layers=_value(reader, "llama.block_count"),
        heads=heads,
        kv_heads=_value(reader, "llama.attention.head_count_kv", heads),
        context=_value(reader, "llama.context_length"),
        norm_eps=round(float(_value(reader, "llama.attention.layer_norm_rms_epsilon")), 9),
        rope_theta=float(_value(reader, "llama.rope.freq_base", 10000.0)),
        tied="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
    )


def _name(path: Path, name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    prefix, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    part, _, kind = inner.rpartition(".")
    if prefix != "blk" or part not in _INNER or kind not in ("weight", "bias"):
        raise BadInput(f"{path} has a tensor {name}, which a LLaMA has not")
    return f"model.layers.{number}.{_INNER[part]}.{kind}"


def interleave_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection [H*d,D], or its bias [H*d], from Hugging Face's half-rotation to
    llama.cpp's pairs."""
    # [H,2,d/2,D] -> [H,d/2,2,D]
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def half_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleave_rotary`: pairs (i, i + half) are adjacent in a GGUF file."""
    # [H,d/2,2,D] -> [H,2,d/2,D]
    return weight.reshape(heads, len(weight) // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
