"""LLaMA: transformers' `LlamaForCausalLM`, and the dims that it is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class LlamaDims:
    """Shape of a LLaMA-architecture decoder (widths in channels, context in tokens).

    `attention_bias` and `mlp_bias` say whether those projections have biases. `rope_scaling` are transformers'
    `rope_parameters` beside the base, where positions are scaled.
    """

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
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: dict[str, Any] | None = None

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.head_width or self.width // self.heads

    @property
    def attention_width(self) -> int:
        """Channels of a layer's queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of one layer's keys (as many for its values)."""
        return self.kv_heads * self.head_dim

    @property
    def weights(self) -> int:
        """Number of weights, norms neglected."""
        return self.product_weights + (0 if self.tied else self.vocabulary * self.width)

    @property
    def product_weights(self) -> int:
        """Number of weights in matrix products, used for every token: the layers and the head, without the embedding
        table unless the head shares it."""
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.ffn_width) + self.vocabulary * self.width

    @property
    def prompt_weights(self) -> int:
        """The same for a token of the prompt."""
        return self.product_weights


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
        attention_bias=dims.attention_bias,
        mlp_bias=dims.mlp_bias,
        rope_parameters={"rope_type": "default", **(dims.rope_scaling or {}), "rope_theta": dims.rope_theta},
        tie_word_embeddings=dims.tied,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=dims.width**-0.5,  # the usual 0.02 at width 2500; too small for narrow decoders
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


class LlamaReference:
    """See `reference.Reference`; also any other decoder with the interface of `LlamaForCausalLM`."""

    def __init__(self, decoder: Any):
        self._decoder = decoder.eval()

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Rows of the embedding table, float32 [T,D]."""
        rows: np.ndarray = self._decoder.get_input_embeddings().weight[list(ids)].detach().numpy()
        return rows

    def forced(self, prompt: np.ndarray, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [n+1,V] and states [n+1,D] after a prompt [T,D] and each of n tokens."""
        import torch

        with torch.no_grad():
            embeds = torch.from_numpy(np.concatenate([prompt, self.embed(tokens)]))[None]  # [1,T+n,D]
            result = self._decoder(inputs_embeds=embeds, output_hidden_states=True, logits_to_keep=len(tokens) + 1)
        states = result.hidden_states[-1][0, -len(tokens) - 1 :]
        return result.logits[0].float().numpy(), states.float().numpy()

    def generate(self, prompt: np.ndarray, most: int, is_end: Callable[[int], bool] = lambda _: False) -> list[int]:
        """Greedy tokens after a prompt [T,D], one by one with a KV cache."""
        import torch

        tokens: list[int] = []
        with torch.no_grad():
            result = self._decoder(inputs_embeds=torch.from_numpy(prompt)[None], use_cache=True)
            while True:
                tokens.append(int(result.logits[0, -1].argmax()))
                if len(tokens) == most or is_end(tokens[-1]):
                    return tokens
                result = self._decoder(
                    torch.tensor([tokens[-1:]]), past_key_values=result.past_key_values, use_cache=True
                )
