"""Connectors that give a chosen number of rows, whatever the encoder's: a Perceiver resampler and a C-Abstractor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Perceiver(nn.Module):
    """Learned rows that look at the features and at themselves (Alayrac et al. 2022, Flamingo, section 3.1.1).

    A test shows equal outputs with transformers' `IdeficsPerceiverResampler`.
    """

    def __init__(self, width: int, tokens: int, layers: int = 2, heads: int = 4, mlp_ratio: int = 4):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.layers = nn.ModuleList(_PerceiverLayer(width, heads, mlp_ratio * width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """[B,N,D] -> [B,M,D]."""
        rows = self.latents.expand(len(features), -1, -1)
        for layer in self.layers:
            rows = layer(rows, features)
        normed: Tensor = self.norm(rows)
        return normed


class _PerceiverLayer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int):
        super().__init__()
        self.heads = heads
        self.features_norm, self.rows_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        wide, narrow = nn.Linear(width, mlp_width, bias=False), nn.Linear(mlp_width, width, bias=False)
        self.feed = nn.Sequential(nn.LayerNorm(width), wide, nn.ReLU(), narrow)

    def forward(self, rows: Tensor, features: Tensor) -> Tensor:
        normed = self.rows_norm(rows)
        seen = torch.cat([self.features_norm(features), normed], dim=1)  # [B,N+M,D]
        queries, keys, values = (self._split(x) for x in (self.q(normed), self.k(seen), self.v(seen)))
        scores = queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5  # [B,H,M,N+M]
        mixed = torch.softmax(scores.float(), dim=-1).type_as(scores) @ values  # [B,H,M,d]
        rows = rows + self.o(mixed.transpose(1, 2).flatten(2))
        out: Tensor = rows + self.feed(rows)
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [B,S,D] -> [B,H,S,d]


class CAbstractor(nn.Module):
    """Convolutions before and after an average over cells, which keep what lies side by side (Cha et al. 2024,
    HoneyBee, section 3.2): RegNet-Y bottlenecks with depthwise kernels and norms over channels, as in
    `honeybee/projectors.py`."""

    def __init__(self, features: int, width: int, tokens: int, depth: int = 3):
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(1, features, width))
        self.before = nn.Sequential(*(_Bottleneck(width) for _ in range(depth)))
        self.after = nn.Sequential(*(_Bottleneck(width) for _ in range(depth)))
        self.pool: Tensor
        self.register_buffer("pool", pooling(math.isqrt(features), math.isqrt(tokens)), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """[B,N,D] by rows of the picture -> [B,M,D]."""
        batch, number, width = features.shape
        side = math.isqrt(number)
        x = (features + self.positions).transpose(1, 2).reshape(batch, width, side, side)
        x = self.before(x)  # [B,C,s,s]
        x = self.pool @ x @ self.pool.T  # [B,C,m,m]
        out: Tensor = self.after(x).flatten(2).transpose(1, 2)
        return out


def pooling(cells: int, means: int) -> Tensor:
    """The means of an adaptive average along a line, as a matrix [means,cells] (`torch.nn.AdaptiveAvgPool2d`), so that
    every size can be lowered."""
    found: Tensor = functional.adaptive_avg_pool1d(torch.eye(cells)[None], means)[0].T
    return found


class _Norm(nn.LayerNorm):
    """Over the channels of [B,C,H,W]."""

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class _Bottleneck(nn.Module):
    """RegNet-Y's block (Radosavovic et al. 2020) with a depthwise kernel: [B,C,H,W] -> [B,C,H,W]."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 1, bias=False), _Norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), _Norm(width)
        self.squeeze, self.excite = nn.Conv2d(width, max(1, width // 4), 1), nn.Conv2d(max(1, width // 4), width, 1)
        self.conv3, self.norm3 = nn.Conv2d(width, width, 1, bias=False), _Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.norm1(self.conv1(x)))
        y = functional.silu(self.norm2(self.conv2(y)))
        mean = y.mean(dim=(2, 3), keepdim=True)  # [B,C,1,1]
        y = y * torch.sigmoid(self.excite(functional.relu(self.squeeze(mean))))
        return functional.silu(self.norm3(self.conv3(y)) + x)
