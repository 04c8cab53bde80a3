"""What of a LLaMA is lowered to the graphs of `engines/parts_language_model.py`.

Norms, projections, feed-forwards and rotary positions are those of transformers' modules; only attention over keys and
values that are inputs is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.plan import StageExport


class EmbedPart(nn.Module):
    """ids int64 [B,T] -> rows of the table [B,T,D]."""

    def __init__(self, model: Any):
        super().__init__()
        self.table = model.get_input_embeddings()

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids)
        return rows


class DecoderPart(nn.Module):
    """Tokens [B,T,D] after the `length` [1] whose keys and values [B,K,C,d] the caches hold: `parts` has the order."""

    def __init__(self, model: Any, dims: LlamaDims):
        super().__init__()
        self.dims, self.model, self.head = dims, model.model, model.lm_head

    def forward(self, embeds: Tensor, length: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        here = length + torch.arange(embeds.shape[1])  # [T]
        turns = self.model.rotary_emb(embeds, here[None])  # cos and sin, [1,T,d]
        unseen = (torch.arange(past[0].shape[2]) >= length)[None] * -1e9  # [1,C]
        later = (here[None] > here[:, None]) * -1e9  # [T,T]
        x, new = embeds, []
        for number, layer in enumerate(self.model.layers):
            normed, attention = layer.input_layernorm(x), layer.self_attn
            queries, keys = (
                _turned(self._split(project(normed)), *turns) for project in (attention.q_proj, attention.k_proj)
            )
            values = self._split(attention.v_proj(normed))  # [B,K,T,d]
            new += [keys, values]
            seen = [(past[2 * number], past[2 * number + 1], unseen), (keys, values, later)]
            x = x + attention.o_proj(self._attend(queries, seen))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        states = self.model.norm(x)
        return (self.head(states[:, -1]), states, *new)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.dims.head_dim).transpose(1, 2)  # [B,T,..] -> [B,heads,T,d]

    def _attend(self, queries: Tensor, seen: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Queries [B,H,T,d] over keys and values [B,K,S,d], with what is added to scores [1 or T,S] -> [B,T,H*d].

        The queries that share keys are multiplied with them together, so keys are never repeated.
        """
        batch, heads, tokens, width = queries.shape
        shared, kv_heads = heads // self.dims.kv_heads, self.dims.kv_heads
        folded = queries.reshape(batch, kv_heads, shared * tokens, width) * width**-0.5
        scores = torch.cat(
            [
                (folded @ keys.transpose(-2, -1)).unflatten(2, (shared, tokens)) + bias  # [B,K,G,T,S]
                for keys, _, bias in seen
            ],
            dim=-1,
        )
        shares = torch.softmax(scores.float(), dim=-1).type_as(scores).flatten(2, 3)  # [B,K,G*T,S of all]
        mixed, first = torch.zeros_like(folded), 0
        for _, values, _ in seen:
            mixed = mixed + shares[..., first : first + values.shape[2]] @ values  # [B,K,G*T,d]
            first += values.shape[2]
        return mixed.reshape(batch, heads, tokens, width).transpose(1, 2).flatten(2)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in LLaMA's order of channels: [B,H,T,d]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def parts(dims: LlamaDims, model: Callable[[], nn.Module]) -> list[StageExport]:
    """The two graphs of a LLaMA that `model()` builds."""

    def caches(kind: str, length: str) -> list[TensorSpec]:
        shape: list[int | str] = ["sequences", dims.kv_heads, length, dims.head_dim]
        return [
            TensorSpec(f"{kind}_{name}_{layer}", "float32", [*shape])
            for layer in range(dims.layers)
            for name in ("key", "value")
        ]

    ids = TensorSpec("ids", "int64", ["sequences", "tokens"])
    embeds = TensorSpec("embeds", "float32", ["sequences", "tokens", dims.width])
    length = TensorSpec("length", "int64", [1])
    outputs = [
        TensorSpec("logits", "float32", ["sequences", dims.vocabulary]),
        TensorSpec("hidden", "float32", ["sequences", "tokens", dims.width]),
        *caches("new", "tokens"),
    ]
    return [
        StageExport("embed", lambda: EmbedPart(model()), [ids], [embeds]),
        StageExport(
            "decoder", lambda: DecoderPart(model(), dims), [embeds, length, *caches("past", "capacity")], outputs
        ),
    ]
