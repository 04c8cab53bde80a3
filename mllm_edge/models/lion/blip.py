"""InstructBLIP and BLIP-2 on a Flan-T5, in transformers' layout: LION without aggregator, adapters and tags.

InstructBLIP's Q-Former reads the question by a tokenizer of its own (folder `qformer_tokenizer`); BLIP-2's reads none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mllm_edge.checkpoints.tensors import Tensors, check_all_used, open_folder, renamed
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.eva import EvaDims
from mllm_edge.models.blocks.qformer import QFormerDims
from mllm_edge.models.fields import check_fixed, real, whole
from mllm_edge.models.language.t5 import t5_dims
from mllm_edge.models.layouts import canonical_name
from mllm_edge.models.lion.model import LionDims, tensor_shapes

KINDS = ("instructblip", "blip-2")
READER = "qformer_tokenizer"
_NAMES = (
    (r"vision_model\.embeddings\.patch_embedding\.", "vision_encoder.patch_embedding."),
    (r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"vision_encoder.layers.\1.self_attn.out_proj."),
    (r"vision_model\.encoder\.layers\.", "vision_encoder.layers."),
    (r"vision_model\.post_layernorm\.", "queries.norm."),
    (r"query_tokens$", "queries.qformer.query_tokens"),
    (r"qformer\.(?:embeddings\.)?layernorm\.", "queries.qformer.embeddings.LayerNorm."),
    (r"qformer\.(.*attention)\.attention\.", r"queries.qformer.\1.self."),
    (r"qformer\.", "queries.qformer."),
    (r"language_projection\.", "queries.proj."),
)
_WITHOUT_EFFECT = {
    r"language_model\.(?:encoder|decoder)\.embed_tokens\.weight": "`shared` again",
    r".*position_ids": "counts upwards",
}


def open_blip(folder: Path, config: Mapping[str, Any]) -> tuple[LionDims, Tensors]:
    """Dims and tensors under our names.

    Raises:
        BadInput: another language model, a field that it cannot have, or a tensor that has no place.
    """
    where = folder / "config.json"
    text = config.get("text_config") or {}
    if text.get("model_type") != "t5":
        kind = text.get("model_type", "nameless")
        raise BadInput(f"{where}: the language model is {kind!r}; a {config['model_type']} on Flan-T5 can be loaded")
    seen, reads = config.get("vision_config") or {}, config.get("qformer_config") or {}
    check_fixed(seen, {"hidden_act": (None, "gelu"), "qkv_bias": (None, True)}, where)
    check_fixed(reads, {"hidden_act": (None, "gelu"), "cross_attention_frequency": (None, 2)}, where)
    layers = whole(seen, "num_hidden_layers", where, 39)
    width = whole(seen, "hidden_size", where, 1408)
    eps = real(seen, "layer_norm_eps", where, 1e-6)
    dims = LionDims(
        EvaDims(
            whole(seen, "image_size", where, 224),
            whole(seen, "patch_size", where, 14),
            width,
            whole(seen, "num_attention_heads", where, 16),
            whole(seen, "intermediate_size", where, 6144),
            taps=(layers - 1,),
            eps=eps,
        ),
        QFormerDims(
            whole(reads, "hidden_size", where, 768),
            whole(reads, "num_hidden_layers", where, 12),
            whole(reads, "num_attention_heads", where, 12),
            whole(reads, "intermediate_size", where, 3072),
            queries=whole(config, "num_query_tokens", where, 32),
            read_width=width,
            vocabulary=whole(reads, "vocab_size", where, 30522) if config["model_type"] == "instructblip" else 0,
            positions=whole(reads, "max_position_embeddings", where, 512),
            eps=real(reads, "layer_norm_eps", where, 1e-12),
        ),
        t5_dims(text, where),
        levels=("query",),
        tags=False,
        norm_eps=eps,
    )
    tensors = _split(renamed(open_folder(folder), lambda name: canonical_name(name, _NAMES) or name))
    check_all_used(tensors, tensor_shapes(dims), _WITHOUT_EFFECT, str(folder))
    return dims, tensors


def _split(source: Tensors) -> Tensors:
    """Queries, keys and values apart, and the class token and positions as EVA has them."""
    found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
    for name in source:
        shape = source.shape(name)
        if name.endswith("embeddings.class_embedding"):
            found["vision_encoder.class_embedding"] = shape[-1:], lambda name=name: source[name].flatten()  # type: ignore[misc]
        elif name.endswith("embeddings.position_embedding"):
            place = "vision_encoder.position_embedding.weight"
            found[place] = shape[1:], lambda name=name: source[name][0]  # type: ignore[misc]
        elif ".self_attn.qkv." in name:
            before, kind = name.split(".qkv.")
            width = shape[0] // 3
            for at, part in enumerate("qkv"):
                found[f"{before}.{part}_proj.{kind}"] = (
                    (width, *shape[1:]),
                    lambda name=name, at=at, width=width: source[name][at * width : (at + 1) * width],  # type: ignore[misc]
                )
        else:
            found[name] = shape, lambda name=name: source[name]  # type: ignore[misc]
    if "language_model.lm_head.weight" not in found:  # tied
        found["language_model.lm_head.weight"] = found["language_model.shared.weight"]
    return Tensors(list(found), lambda name: found[name][1](), lambda name: found[name][0], source_of(source))


def source_of(source: Tensors) -> Callable[[str], str]:
    """Where a tensor stands, as far as it kept its name."""
    return lambda name: source.origin(name) if name in source else name
