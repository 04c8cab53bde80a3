"""LLaMA: transformers' `LlamaForCausalLM`, and the shape that it is built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LlamaDims:
    """Shape of a LLaMA-architecture decoder (widths in channels, context in tokens)."""

    vocabulary: int
    width: int
    ffn_width: int
    layers: int
    heads: int
    kv_heads: int
    context: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tied: bool = False
    head_width: int | None = None

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Channels of one layer's keys, and as many of its values."""
        return self.kv_heads * self.head_dim

    @property
    def weights(self) -> int:
        """How many weights the decoder has; its norms are too few to count."""
        return self.product_weights + (0 if self.tied else self.vocabulary * self.width)

    @property
    def product_weights(self) -> int:
        """The weights that every token is multiplied with: all but the embedding table, which only the head may
        share."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn_width) + self.vocabulary * self.width


def llama(dims: LlamaDims) -> nn.Module:
    """The decoder: transformers' `LlamaForCausalLM`, which is the reference."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=dims.vocabulary,
        hidden_size=dims.width,
        intermediate_size=dims.ffn_width,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        num_key_value_heads=dims.kv_heads,
        head_dim=dims.head_dim,
        max_position_embeddings=dims.context,
        rms_norm_eps=dims.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": dims.rope_theta},
        tie_word_embeddings=dims.tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=dims.width**-0.5,  # the usual 0.02 at width 2500; narrow decoders learn little from it
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model
