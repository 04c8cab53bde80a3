"""The Q-Former: learned queries that read an encoder's features, and a question beside them (BLIP-2, InstructBLIP).

LION's has 32 queries, 12 layers and words; SmartEdit's 77 queries and 6 layers, and reads the language model's states.
Parameter names are those of LAVIS (`Qformer.bert.*`); a test shows equal outputs with transformers' classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_edge.models.blocks.bert import BertDims, BertLayer


@dataclass(frozen=True)
class QFormerDims:
    """Shape of a Q-Former. `read_width` are the channels of the features that it reads, in every second layer;
    `vocabulary` 0 means that it reads no words."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    queries: int
    read_width: int
    vocabulary: int = 0
    positions: int = 512
    eps: float = 1e-12

    def layer(self, number: int) -> BertDims:
        """Dims of layer `number`, from 0."""
        read = 0 if number % 2 else self.read_width
        return BertDims(self.width, self.heads, self.mlp_width, read, eps=self.eps)


class _Embeddings(nn.Module):
    def __init__(self, dims: QFormerDims):
        super().__init__()
        if dims.vocabulary:
            self.word_embeddings = nn.Embedding(dims.vocabulary, dims.width)
            self.position_embeddings = nn.Embedding(dims.positions, dims.width)
        self.LayerNorm = nn.LayerNorm(dims.width, eps=dims.eps)

    def forward(self, queries: Tensor, ids: Tensor | None) -> Tensor:
        """Queries [B,Q,D] have no positions, those of words [B,T] begin at 0: -> [B,Q+T,D]."""
        if ids is not None:
            words = self.word_embeddings(ids) + self.position_embeddings.weight[: ids.shape[1]]  # [B,T,D]
            queries = torch.cat([queries, words], dim=1)
        normed: Tensor = self.LayerNorm(queries)
        return normed


class _Layers(nn.Module):
    def __init__(self, dims: QFormerDims):
        super().__init__()
        self.layer = nn.ModuleList(
            BertLayer(dims.layer(number), dims.queries, words=dims.vocabulary > 0) for number in range(dims.layers)
        )


class QFormer(nn.Module):
    """Features, and words where it reads such, to one row per query."""

    def __init__(self, dims: QFormerDims):
        super().__init__()
        self.dims = dims
        self.query_tokens = nn.Parameter(torch.randn(1, dims.queries, dims.width) * 0.02)
        self.embeddings = _Embeddings(dims)
        self.encoder = _Layers(dims)

    def forward(self, features: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """`features` [B,S,Dv]; `ids` int64 [B,T] of the question with `mask` [B,T], 1 for its tokens and 0 for padding
        -> [B,Q,D]."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        x = self.embeddings(queries, ids)  # [B,Q+T,D]
        if mask is not None:
            mask = torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1)  # [B,Q+T]
        for layer in self.encoder.layer:
            x = layer(x, features, mask)
        return x[:, : self.dims.queries]
