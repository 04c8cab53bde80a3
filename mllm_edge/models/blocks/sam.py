"""SAM's image encoder (Kirillov et al. 2023, arXiv 2304.02643; segment_anything/modeling/image_encoder.py).

Reimplemented rather than taken from transformers, because the graph must be static and need little memory: global
attention scores (16 heads of 4096 x 4096 in ViT-H) are computed a few heads at a time. Parameter names are those of
the published checkpoints; a test shows outputs equal to transformers' `SamModel` on equal weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

SCORES = 1 << 26  # attention scores held at once, in elements (256 MB in fp32)


@dataclass(frozen=True)
class SamDims:
    """Shape of a SAM image encoder. `out_width` is the width of the embedding and of the mask decoder."""

    image_size: int = 1024
    patch_size: int = 16
    width: int = 1280
    layers: int = 32
    heads: int = 16
    mlp_width: int = 5120
    window: int = 14
    global_layers: tuple[int, ...] = (7, 15, 23, 31)
    out_width: int = 256

    @property
    def grid(self) -> int:
        """Cells of the embedding along one side."""
        return self.image_size // self.patch_size


SAM_VIT_H = SamDims()
SAM_VIT_B = SamDims(width=768, layers=12, heads=12, mlp_width=3072, global_layers=(2, 5, 8, 11))


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of [B,C,H,W]."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        channels = x.permute(0, 2, 3, 1)
        return functional.layer_norm(channels, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Non-overlapping patches: [B,3,S,S] -> [B,G,G,D]."""

    def __init__(self, dims: SamDims):
        super().__init__()
        self.proj = nn.Conv2d(3, dims.width, dims.patch_size, dims.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class RelativeAttention(nn.Module):
    """Self-attention over a square of cells, with a learned relative-position bias along each axis."""

    def __init__(self, width: int, heads: int, side: int):
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        cells = torch.arange(side)
        self.register_buffer("distance", cells[:, None] - cells[None, :] + side - 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B,side,side,D] -> the same."""
        batch, side, _, width = x.shape
        cells, depth = side * side, width // self.heads
        q, k, v = self.qkv(x).reshape(batch, cells, 3, self.heads, depth).permute(2, 0, 3, 1, 4).unbind(0)
        # q, k, v: [B,H,N,d], N = side * side
        part = max(1, SCORES // (batch * cells * cells))
        mixed = [self._attend(q[:, i : i + part], k[:, i : i + part], v[:, i : i + part]) for i in self._starts(part)]
        out = torch.cat(mixed, dim=1).transpose(1, 2).reshape(batch, side, side, width)  # [B,side,side,D]
        return self.proj(out)

    def _starts(self, part: int) -> range:
        return range(0, self.heads, part)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of h of the heads: q, k, v [B,h,N,d] -> [B,h,N,d]."""
        batch, heads, cells, depth = q.shape
        side, distance = self.side, cast("Tensor", self.distance)
        grid = q.reshape(batch, heads, side, side, depth)
        rows = grid @ self.rel_pos_h[distance].transpose(1, 2)  # [B,h,row,column,key row]
        columns = grid.transpose(2, 3) @ self.rel_pos_w[distance].transpose(1, 2)  # [B,h,column,row,key column]
        scores = ((q * depth**-0.5) @ k.transpose(-2, -1)).reshape(batch, heads, side, side, side, side)
        # [B,h,row,column,key row,key column]
        scores = scores + rows.unsqueeze(-1) + columns.transpose(2, 3).unsqueeze(-2)
        return torch.softmax(scores.reshape(batch, heads, cells, cells), dim=-1) @ v


class SamMlp(nn.Module):
    """Two linears with GELU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(functional.gelu(self.lin1(x)))


class SamBlock(nn.Module):
    """Pre-norm block, [B,G,G,D] -> the same, with windowed attention, or global attention if `window` is 0."""

    def __init__(self, dims: SamDims, window: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dims.width, eps=1e-6)
        self.attn = RelativeAttention(dims.width, dims.heads, window or dims.grid)
        self.norm2 = nn.LayerNorm(dims.width, eps=1e-6)
        self.mlp = SamMlp(dims.width, dims.mlp_width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + (self._in_windows(normed) if self.window else self.attn(normed))
        return x + self.mlp(self.norm2(x))

    def _in_windows(self, x: Tensor) -> Tensor:
        """Attention in squares of `window` cells; the grid is zero-padded to a multiple of it."""
        batch, grid, _, width = x.shape
        count = -(-grid // self.window)
        extra = count * self.window - grid
        x = functional.pad(x, (0, 0, 0, extra, 0, extra))  # [B,count*w,count*w,D]
        # [B,count,count,w,w,D]
        squares = x.reshape(batch, count, self.window, count, self.window, width).transpose(2, 3)
        squares = self.attn(squares.reshape(batch * count * count, self.window, self.window, width))
        # [B,count,w,count,w,D]
        x = squares.reshape(batch, count, count, self.window, self.window, width).transpose(2, 3)
        return x.reshape(batch, grid + extra, grid + extra, width)[:, :grid, :grid]


class SamImageEncoder(nn.Module):
    """[B,3,S,S] -> [B,C,G,G]: patches, blocks, and a neck of two convolutions."""

    def __init__(self, dims: SamDims):
        super().__init__()
        self.patch_embed = PatchEmbed(dims)
        self.pos_embed = nn.Parameter(torch.randn(1, dims.grid, dims.grid, dims.width) * 0.02)
        self.blocks = nn.ModuleList(
            SamBlock(dims, 0 if number in dims.global_layers else dims.window) for number in range(dims.layers)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dims.width, dims.out_width, 1, bias=False),
            LayerNorm2d(dims.out_width),
            nn.Conv2d(dims.out_width, dims.out_width, 3, padding=1, bias=False),
            LayerNorm2d(dims.out_width),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values) + self.pos_embed  # [B,G,G,D]
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.neck(x.permute(0, 3, 1, 2))  # [B,C,G,G]
        return embedding
