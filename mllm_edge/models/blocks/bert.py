"""BERT's layer as multimodal models use it: post-norm, with attention to itself, to something else, or both.

Q-Former (BLIP-2, InstructBLIP), LION's Vision Aggregator and RAM's tagging head are made of it. Parameter names are
those of `transformers.BertLayer`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class BertDims:
    """Shape of a layer. `cross_width` are the channels of what cross-attention reads (0: there is none), `looks_inside`
    whether there is self-attention."""

    width: int
    heads: int
    mlp_width: int
    cross_width: int = 0
    looks_inside: bool = True
    eps: float = 1e-12


class _Projections(nn.Module):
    """Queries, keys and values of one attention; names as `BertSelfAttention`."""

    def __init__(self, width: int, read: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(read, width)
        self.value = nn.Linear(read, width)


class _Output(nn.Module):
    """A linear, and the norm of its sum with what went in; names as `BertSelfOutput` and `BertOutput`."""

    def __init__(self, width: int, out_width: int, eps: float):
        super().__init__()
        self.dense = nn.Linear(width, out_width)
        self.LayerNorm = nn.LayerNorm(out_width, eps=eps)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    """Attention of x [B,T,D] to `read` [B,S,D'], added and normalized: -> [B,T,D]."""

    def __init__(self, dims: BertDims, read: int):
        super().__init__()
        self.heads = dims.heads
        self.self = _Projections(dims.width, read)  # sic: the published name
        self.output = _Output(dims.width, dims.width, dims.eps)

    def forward(self, x: Tensor, read: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` [B,S], where it is given, is 1 where `read` may be looked at and 0 elsewhere."""
        q, k, v = self.self.query(x), self.self.key(read), self.self.value(read)
        q, k, v = self._split(q), self._split(k), self._split(v)  # [B,H,T,d], [B,H,S,d]
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B,H,T,S]
        if mask is not None:
            scores = scores + (1.0 - mask[:, None, None].to(scores.dtype)) * -1e4
        mixed = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)  # [B,T,D]
        attended: Tensor = self.output(mixed, x)
        return attended

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [B,H,T,d]


class _Intermediate(nn.Module):
    def __init__(self, dims: BertDims):
        super().__init__()
        self.dense = nn.Linear(dims.width, dims.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(x))


class BertLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward, each with its sum and norm after it; no causal mask.

    With `queries` the first `queries` rows have a feed-forward of their own and alone read across (InstructBLIP's
    `InstructBlipQFormerLayer`); without words there is no other feed-forward.
    """

    def __init__(self, dims: BertDims, queries: int = 0, words: bool = True):
        super().__init__()
        self.queries, self.words = queries, words
        if dims.looks_inside:
            self.attention = BertAttention(dims, dims.width)
        if dims.cross_width:
            self.crossattention = BertAttention(dims, dims.cross_width)
        for name, there in (("", words), ("_query", queries > 0)):
            if there:
                setattr(self, f"intermediate{name}", _Intermediate(dims))
                setattr(self, f"output{name}", _Output(dims.mlp_width, dims.width, dims.eps))
        self.dims = dims

    def forward(self, x: Tensor, read: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x [B,T,D]; `read` [B,S,D'] of cross-attention; `mask` [B,T] of self-attention -> [B,T,D]."""
        if self.dims.looks_inside:
            x = self.attention(x, x, mask)
        if not self.queries:
            return self._feed(self._across(x, read), "")
        rows = self._feed(self._across(x[:, : self.queries], read), "_query")
        if not self.words or x.shape[1] == self.queries:
            return rows
        return torch.cat([rows, self._feed(x[:, self.queries :], "")], dim=1)

    def _across(self, x: Tensor, read: Tensor | None) -> Tensor:
        if not self.dims.cross_width:
            return x
        assert read is not None
        attended: Tensor = self.crossattention(x, read)
        return attended

    def _feed(self, x: Tensor, name: str) -> Tensor:
        intermediate, output = getattr(self, f"intermediate{name}"), getattr(self, f"output{name}")
        mixed: Tensor = output(intermediate(x), x)
        return mixed
