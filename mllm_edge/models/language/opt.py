"""OPT: transformers' `OPTForCausalLM`, and the dims that it is built from.

Its reference is `llama.LlamaReference`, which takes any decoder with the interface of `LlamaForCausalLM`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_edge.errors import BadInput
from mllm_edge.models.fields import MOST_LAYERS, check_fixed, whole

if TYPE_CHECKING:
    from torch import nn

TABLE = "model.decoder.embed_tokens.weight"  # which is the head, too
UNUSED_POSITIONS = 2  # rows of the table of positions before the first position's (`OPTLearnedPositionalEmbedding`)
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": (None, "relu"),
    "do_layer_norm_before": (None, True),
    "_remove_final_layer_norm": (None, False),
    "enable_bias": (None, True),
    "layer_norm_elementwise_affine": (None, True),
    "tie_word_embeddings": (None, True),
}


@dataclass(frozen=True)
class OptDims:
    """Shape of an OPT decoder (widths in channels, context in tokens). Positions are learned: `context` is the end."""

    vocabulary: int
    width: int
    ffn_width: int
    layers: int
    heads: int
    context: int = 2048

    @property
    def attention_width(self) -> int:
        """Channels of a layer's queries."""
        return self.width

    @property
    def kv_width(self) -> int:
        """Channels of one layer's keys (as many for its values)."""
        return self.width

    @property
    def weights(self) -> int:
        """Number of weights, norms and biases neglected."""
        return self.product_weights + self.context * self.width

    @property
    def product_weights(self) -> int:
        """Number of weights in matrix products, used for every token: the layers and the head, which is the embedding
        table."""
        return self.layers * (4 * self.width + 2 * self.ffn_width) * self.width + self.vocabulary * self.width

    @property
    def prompt_weights(self) -> int:
        """The same for a token of the prompt."""
        return self.product_weights


def opt_dims(config: Mapping[str, Any], vocabulary: int, where: Path) -> OptDims:
    """Dims of an OPT from its fields in transformers' spelling.

    Args:
        config: the fields; those that are left out have transformers' defaults.
        vocabulary: the embedding table's actual rows.
        where: the file of the fields.

    Raises:
        BadInput: a field (named, with its value) that an OPT in llama.cpp cannot have.
    """
    check_fixed(config, _FIXED, where)
    width, heads = whole(config, "hidden_size", where, 768), whole(config, "num_attention_heads", where, 12)
    check_fixed(config, {"word_embed_proj_dim": (None, width)}, where)
    if width % heads:
        raise BadInput(f"{where} has hidden_size {width}, no multiple of num_attention_heads {heads}; copy it again")
    return OptDims(
        vocabulary=vocabulary,
        width=width,
        ffn_width=whole(config, "ffn_dim", where, 3072),
        layers=whole(config, "num_hidden_layers", where, 12, most=MOST_LAYERS),
        heads=heads,
        context=whole(config, "max_position_embeddings", where, 2048),
    )


def canonical(name: str) -> str | None:
    """A published file's tensor as `OPTForCausalLM` calls it, or None for the head, which is the embedding table.

    The files of 6.7b, 13b and 30b say `decoder.`, those of 125m, 1.3b and 2.7b `model.decoder.`.
    """
    return None if name == "lm_head.weight" else re.sub(r"^(model\.)?decoder\.", "model.decoder.", name)


def opt(dims: OptDims) -> nn.Module:
    """The decoder: transformers' `OPTForCausalLM`, which is the reference. It drops nothing in training."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=dims.vocabulary,
        hidden_size=dims.width,
        ffn_dim=dims.ffn_width,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        max_position_embeddings=dims.context,
        dropout=0.0,
        pad_token_id=None,  # whose row would not be learned
        bos_token_id=2,
        eos_token_id=2,
        init_std=dims.width**-0.5,  # the usual 0.02 at width 2500; too small for narrow decoders
    )
    model: nn.Module = OPTForCausalLM(config)
    return model
