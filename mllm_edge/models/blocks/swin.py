"""The Swin transformer: attention in windows that shift by half their side in every second block (Liu et al. 2021).

RAM's image encoder (`ram/models/swin_transformer.py`), whose parameter names these are. The picture's size is fixed, so
windows, masks and positions are constants of the graph. A test shows equal outputs with transformers' class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_edge.errors import BadInput


@dataclass(frozen=True)
class SwinDims:
    """Shape of a Swin. `width` is that of the first stage; it doubles with each, while the sides of the map halve."""

    image_size: int
    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    patch_size: int = 4
    mlp_ratio: int = 4
    eps: float = 1e-5

    @property
    def out_width(self) -> int:
        """Channels of the last stage."""
        return self.width << len(self.depths) - 1

    def side(self, stage: int) -> int:
        """Side of the map in a stage. Raises BadInput where windows do not tile it."""
        side = self.image_size // self.patch_size >> stage
        if side > self.window and side % self.window:
            raise BadInput(f"windows of {self.window} do not tile a map of {side} x {side} in stage {stage}")
        return side


def _windows(x: Tensor, window: int) -> Tensor:
    """[B,S,S,C] -> [B*n,window*window,C], windows by rows."""
    batch, side, _, width = x.shape
    cells = side // window
    x = x.reshape(batch, cells, window, cells, window, width).transpose(2, 3)  # [B,cells,cells,window,window,C]
    return x.reshape(-1, window * window, width)


def _joined(x: Tensor, window: int, side: int) -> Tensor:
    """Undoes `_windows`: -> [B,S,S,C]."""
    cells, width = side // window, x.shape[-1]
    return x.reshape(-1, cells, cells, window, window, width).transpose(2, 3).reshape(-1, side, side, width)


def _offsets(window: int) -> Tensor:
    """For each pair of positions in a window its row in the table of relative positions: int64 [w*w,w*w]."""
    places = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(
        1
    )  # [2,w*w]
    away = places[:, :, None] - places[:, None] + window - 1  # [2,w*w,w*w]
    return away[0] * (2 * window - 1) + away[1]


def _apart(side: int, window: int, shift: int) -> Tensor:
    """What keeps parts of a shifted map that were no neighbors from looking at each other: [n,w*w,w*w]."""
    regions = torch.zeros(side)
    regions[-window:-shift], regions[-shift:] = 1, 2
    numbered = regions[:, None] * 3 + regions[None]  # [S,S]
    rows = _windows(numbered[None, :, :, None], window)[..., 0]  # [n,w*w]
    return (rows[:, :, None] != rows[:, None]).float() * -100.0


class WindowAttention(nn.Module):
    """Multi-head attention within windows [B*n,T,C], with a learned score for each relative position."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.offsets: Tensor
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("offsets", _offsets(window), persistent=False)

    def forward(self, x: Tensor, apart: Tensor | None) -> Tensor:
        number, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(number, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B*n,H,T,d] each
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)  # [B*n,H,T,T]
        scores = scores + self.relative_position_bias_table[self.offsets].permute(2, 0, 1)
        if apart is not None:
            masked = scores.reshape(-1, len(apart), self.heads, tokens, tokens) + apart[:, None]
            scores = masked.reshape(number, self.heads, tokens, tokens)
        mixed: Tensor = torch.softmax(scores, dim=-1) @ v  # [B*n,H,T,d]
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(number, tokens, width))
        return out


class _Mlp(nn.Module):
    def __init__(self, width: int, ratio: int):
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class SwinBlock(nn.Module):
    """[B,S*S,C] -> the same. A map no larger than a window is one window, unshifted."""

    def __init__(self, dims: SwinDims, stage: int, number: int):
        super().__init__()
        width, self.side = dims.width << stage, dims.side(stage)
        self.window = min(dims.window, self.side)
        self.shift = self.window // 2 if number % 2 and self.side > self.window else 0
        self.norm1 = nn.LayerNorm(width, eps=dims.eps)
        self.attn = WindowAttention(width, dims.heads[stage], self.window)
        self.norm2 = nn.LayerNorm(width, eps=dims.eps)
        self.mlp = _Mlp(width, dims.mlp_ratio)
        apart = _apart(self.side, self.window, self.shift) if self.shift else None
        self.register_buffer("apart", apart, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        grid = self.norm1(x).reshape(batch, self.side, self.side, width)
        grid = torch.roll(grid, (-self.shift, -self.shift), dims=(1, 2)) if self.shift else grid
        grid = _joined(self.attn(_windows(grid, self.window), self.apart), self.window, self.side)
        grid = torch.roll(grid, (self.shift, self.shift), dims=(1, 2)) if self.shift else grid
        x = x + grid.reshape(batch, tokens, width)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchMerging(nn.Module):
    """Each square of 2 x 2 becomes one position of twice the width: [B,S*S,C] -> [B,S*S/4,2C]."""

    def __init__(self, width: int, side: int, eps: float):
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width, eps=eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        half = self.side // 2
        squares = x.reshape(batch, half, 2, half, 2, width).permute(0, 1, 3, 4, 2, 5)  # [B,half,half,column,row,C]
        out: Tensor = self.reduction(self.norm(squares.reshape(batch, half * half, 4 * width)))
        return out


class _Stage(nn.Module):
    def __init__(self, dims: SwinDims, stage: int):
        super().__init__()
        self.blocks = nn.ModuleList(SwinBlock(dims, stage, number) for number in range(dims.depths[stage]))
        if stage + 1 < len(dims.depths):
            self.downsample = PatchMerging(dims.width << stage, dims.side(stage), dims.eps)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class _Patches(nn.Module):
    def __init__(self, dims: SwinDims):
        super().__init__()
        self.proj = nn.Conv2d(3, dims.width, dims.patch_size, dims.patch_size)
        self.norm = nn.LayerNorm(dims.width, eps=dims.eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        out: Tensor = self.norm(self.proj(pixel_values).flatten(2).transpose(1, 2))
        return out


class Swin(nn.Module):
    """[B,3,S,S] -> normalized features [B,N,C] of the last stage."""

    def __init__(self, dims: SwinDims):
        super().__init__()
        self.patch_embed = _Patches(dims)
        self.layers = nn.ModuleList(_Stage(dims, stage) for stage in range(len(dims.depths)))
        self.norm = nn.LayerNorm(dims.out_width, eps=dims.eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values)
        for stage in self.layers:
            x = stage(x)
        out: Tensor = self.norm(x)
        return out
