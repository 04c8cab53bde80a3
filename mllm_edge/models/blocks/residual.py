"""Blocks of convolutions that the UNet and the autoencoder of latent diffusion share (Rombach et al. 2022).

Parameter names are those of diffusers (`models/resnet.py`, `downsampling.py`, `upsampling.py`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """[B,Ci,h,w] -> [B,Co,h,w]; where `embedded`, E, is not 0, a timestep's embedding [B,E] or [1,E] is added between
    the convolutions."""

    def __init__(self, width: int, out_width: int, groups: int, eps: float, embedded: int = 0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=eps)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        if embedded:
            self.time_emb_proj = nn.Linear(embedded, out_width)
        self.norm2 = nn.GroupNorm(groups, out_width, eps=eps)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.conv_shortcut = None if width == out_width else nn.Conv2d(width, out_width, 1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        found = self.conv1(functional.silu(self.norm1(x)))
        if embedding is not None:
            found = found + self.time_emb_proj(functional.silu(embedding))[..., None, None]  # [B,Co,1,1]
        found = self.conv2(functional.silu(self.norm2(found)))
        passed = x if self.conv_shortcut is None else self.conv_shortcut(x)
        out: Tensor = passed + found
        return out


class Downsample(nn.Module):
    """Half the sides. `both`: zeros stand around the map, else only right and below, as in the autoencoder."""

    def __init__(self, width: int, both: bool):
        super().__init__()
        self.both = both
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1 if both else 0)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x if self.both else functional.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Twice the sides, or one row or column less where `size` (h, w) says so: nearest, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        batch, width, rows, columns = x.shape
        high, wide = size or (2 * rows, 2 * columns)
        # Plain copies, which every precision has; nearest to 2n - 1 is nearest to 2n without its last.
        twice = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(batch, width, 2 * rows, 2 * columns)
        out: Tensor = self.conv(twice[:, :, :high, :wide])
        return out
