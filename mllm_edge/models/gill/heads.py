"""What GILL makes of the states at its picture tokens (Koh et al. 2023, sections 3.1 to 3.3; `gill/layers.py`).

Parameter names are those of the published files, and inside the mapper those of `torch.nn.Transformer`. That class is
written anew because its graph depends on switches of the framework; a test shows equal outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class MapperDims:
    """Shape of the GILLMapper: `layers` of an encoder and as many of a decoder, and `queries` learned rows of `width`,
    which become what the diffusion model reads, [queries,out_width]."""

    width: int = 512
    layers: int = 4
    heads: int = 4
    mlp_width: int = 2048
    queries: int = 77
    out_width: int = 768


class _Attention(nn.Module):
    """Rows [B,N,D] look at others [B,T,D]."""

    def __init__(self, dims: MapperDims):
        super().__init__()
        self.heads = dims.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dims.width, dims.width))  # of queries, keys, values
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dims.width))
        self.out_proj = nn.Linear(dims.width, dims.width)

    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        width = x.shape[-1]
        depth = width // self.heads
        weights, biases = self.in_proj_weight.view(3, width, width), self.in_proj_bias.view(3, width)
        q, k, v = (
            functional.linear(rows, weights[at], biases[at]).view(*rows.shape[:2], self.heads, depth).transpose(1, 2)
            for at, rows in enumerate((x, read, read))
        )
        # [B,H,N,d] each
        mixed = torch.softmax(q * depth**-0.5 @ k.transpose(2, 3), dim=-1) @ v
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class _Layer(nn.Module):
    """Norms first; a layer of the decoder (`reads`) also looks at what the encoder gives."""

    def __init__(self, dims: MapperDims, reads: bool):
        super().__init__()
        self.self_attn = _Attention(dims)
        self.multihead_attn = _Attention(dims) if reads else None
        self.linear1 = nn.Linear(dims.width, dims.mlp_width)
        self.linear2 = nn.Linear(dims.mlp_width, dims.width)
        self.norm1, self.norm2 = nn.LayerNorm(dims.width), nn.LayerNorm(dims.width)
        self.norm3 = nn.LayerNorm(dims.width) if reads else None

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        x = x + self.self_attn(normed, normed)
        normed = self.norm2(x)
        if self.multihead_attn is not None and self.norm3 is not None:
            x = x + self.multihead_attn(normed, memory)
            normed = self.norm3(x)
        return x + self.linear2(torch.relu(self.linear1(normed)))


class _Stack(nn.Module):
    def __init__(self, dims: MapperDims, reads: bool):
        super().__init__()
        self.layers = nn.ModuleList(_Layer(dims, reads) for _ in range(dims.layers))
        self.norm = nn.LayerNorm(dims.width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, memory)
        out: Tensor = self.norm(x)
        return out


class _Transformer(nn.Module):
    def __init__(self, dims: MapperDims):
        super().__init__()
        self.encoder, self.decoder = _Stack(dims, reads=False), _Stack(dims, reads=True)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)  # as in torch's class

    def forward(self, read: Tensor, queries: Tensor) -> Tensor:
        out: Tensor = self.decoder(queries, self.encoder(read))
        return out


class Mapper(nn.Module):
    """States of the picture tokens to a text encoder's output (`TextFcLayer`, mode `gill_mapper`)."""

    def __init__(self, dims: MapperDims, in_width: int):
        super().__init__()
        self.fc = nn.Linear(in_width, dims.width)
        self.tfm = _Transformer(dims)
        self.model = nn.Linear(dims.width, dims.out_width)
        self.query_embs = nn.Parameter(torch.randn(1, dims.queries, dims.width))

    def forward(self, states: Tensor, embeds: Tensor) -> Tensor:
        """States at the tokens and the tokens' own embeddings, [B,8,D] each -> [B,queries,out_width]."""
        read = self.fc(states + embeds)  # [B,8,width]
        rows: Tensor = self.model(self.tfm(read, self.query_embs.expand(len(read), -1, -1)))
        return rows


class Heads(nn.Module):
    """Mapper, retrieval head and decision head; the last two read the first state alone."""

    def __init__(self, dims: MapperDims, in_width: int, query_width: int, decides: bool):
        super().__init__()
        self.mapper = Mapper(dims, in_width)
        self.retrieval = nn.Linear(in_width, query_width)
        self.decision = nn.Linear(in_width, 2) if decides else None

    def forward(self, states: Tensor, embeds: Tensor) -> tuple[Tensor, ...]:
        """States at the tokens and the tokens' own embeddings, [B,8,D] each.

        Returns:
            What the diffusion model reads [B,queries,out_width], what is looked for among pictures [B,d], and where
            it decides logits of retrieving and of generating [B,2], which the weights have the other way round.
        """
        first = states[:, 0]
        found = (self.mapper(states, embeds), self.retrieval(first))
        return found if self.decision is None else (*found, self.decision(first)[:, [1, 0]])


class HeadsOfTokens(nn.Module):
    """The heads with the embeddings of the picture tokens, float32 [8,D], inside: what an export lowers."""

    def __init__(self, heads: nn.Module, embeds: Tensor):
        super().__init__()
        self.heads = heads
        self.embeds: Tensor
        self.register_buffer("embeds", embeds, persistent=False)

    def forward(self, states: Tensor) -> tuple[Tensor, ...]:
        """States [8,D] of one group; see `Heads.forward`, B is 1."""
        found: tuple[Tensor, ...] = self.heads(states[None], self.embeds[None])
        return found
