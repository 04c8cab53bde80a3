"""EVA's vision transformer (EVA-CLIP ViT-g), tapped after several blocks, class token kept (LION, `eva_vit.py`).

It is CLIP's block with exact GELU; its keys have no bias, which softmax would cancel. Positions are learned, there is
neither a norm before the first block nor one after the last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_edge.models.blocks.vit import Block, VitDims


@dataclass(frozen=True)
class EvaDims:
    """Shape of an EVA. `taps` are blocks, from 0, whose outputs are returned in that order; those after the last of
    them are not built."""

    image_size: int
    patch_size: int
    width: int
    heads: int
    mlp_width: int
    taps: tuple[int, ...]
    eps: float = 1e-6

    @property
    def patches(self) -> int:
        """Number of patch tokens N (without the class token)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return max(self.taps) + 1

    def block(self) -> VitDims:
        """The dims of each block."""
        return VitDims(
            self.image_size,
            self.patch_size,
            self.width,
            self.depth,
            self.heads,
            self.mlp_width,
            eps=self.eps,
            activation="gelu",
        )


class EvaEncoder(nn.Module):
    """[B,3,S,S] -> one [B,1+N,D] per tap."""

    def __init__(self, dims: EvaDims):
        super().__init__()
        self.dims = dims
        self.class_embedding = nn.Parameter(torch.randn(dims.width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, dims.width, dims.patch_size, dims.patch_size)
        self.position_embedding = nn.Embedding(dims.patches + 1, dims.width)
        self.layers = nn.ModuleList(Block(dims.block()) for _ in range(dims.depth))

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B,N,D]
        class_token = self.class_embedding.expand(len(patches), 1, -1)  # [B,1,D]
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding.weight
        outputs = []
        for block in self.layers:
            x = block(x)
            outputs.append(x)
        return tuple(outputs[tap] for tap in self.dims.taps)
