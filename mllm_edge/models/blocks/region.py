"""GLaMM's region encoder (groundingLMM model/layers.py `MLVLROIQueryModule`): boxes on four levels of CLIP features.

Parameter names are the original's, and so are its oddities: one module for all levels of a round, and boxes scaled by
a constant that is independent of the features' resolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

LEVELS = 4
SAMPLES = 2  # per axis of a bin


@dataclass(frozen=True)
class RegionDims:
    """Shape of a region encoder.

    `width` is the fused maps' channels, `middle` a region's channels before projection to the decoder's width, `bins`
    the side of a region's raster. Boxes in 0..1 times `box_scale` are divided by each level's entry of `strides`.
    """

    width: int = 1024
    middle: int = 1024
    position_width: int = 256
    groups: int = 64
    rounds: int = 5
    bins: int = 14
    box_scale: float = 224.0
    strides: tuple[float, ...] = (1.75, 3.5, 7.0, 14.0)


def roi_align(features: Tensor, boxes: Tensor, bins: int) -> Tensor:
    """RoIAlign, aligned, two samples per axis and bin (He et al. 2017; mmcv's and torchvision's `aligned=True`).

    Each sample is a bilinear look-up and each bin the mean of its samples. Both are linear and separable, so RoIAlign
    is a product with one small matrix for rows and one for columns, which every engine supports.

    Args:
        features: [1,C,H,W], or [n,C,H,W] with one map per box.
        boxes: [n,4], x1,y1,x2,y2 in cells of the map (already scaled).
        bins: side of the result.

    Returns:
        [n,C,bins,bins].
    """
    rows = _bin_weights(boxes[:, 1], boxes[:, 3], features.shape[2], bins)  # [n,bins,H]
    columns = _bin_weights(boxes[:, 0], boxes[:, 2], features.shape[3], bins)  # [n,bins,W]
    return (rows.unsqueeze(1) @ features) @ columns.unsqueeze(1).transpose(2, 3)  # [n,C,bins,bins]


def _bin_weights(low: Tensor, high: Tensor, size: int, bins: int) -> Tensor:
    """Weight of each cell along an axis in each bin: [n] and [n] -> [n,bins,size]."""
    low, high = low - 0.5, high - 0.5  # aligned: cell centers lie at whole numbers
    steps = (torch.arange(bins * SAMPLES, device=low.device, dtype=low.dtype) + 0.5) / (bins * SAMPLES)
    places = low.unsqueeze(1) + (high - low).unsqueeze(1) * steps  # [n,bins*SAMPLES]
    inside = ((places >= -1) & (places <= size)).to(low.dtype)
    cells = torch.arange(size, device=low.device, dtype=low.dtype)
    distance = (places.clamp(0, size - 1).unsqueeze(2) - cells).abs()  # [n,bins*SAMPLES,size]
    weights = (1 - distance).clamp(min=0) * inside.unsqueeze(2)  # [n,bins*SAMPLES,size]
    return weights.reshape(-1, bins, SAMPLES, size).mean(dim=2)


class _Conv(nn.Module):
    """3x3 convolution, group norm, ReLU (mmcv's `ConvModule`)."""

    def __init__(self, dims: RegionDims):
        super().__init__()
        self.conv = nn.Conv2d(dims.width, dims.width, 3, padding=1, bias=False)
        self.gn = nn.GroupNorm(dims.groups, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.gn(self.conv(x)))


class LevelFusion(nn.Module):
    """Four levels exchange a quarter of their channels with the level above and the level below, in rounds.

    Each level [P,Dv,g,g] -> [P,C,g,g], g from 8G (level 0) to G (level 3).
    """

    def __init__(self, feature_width: int, dims: RegionDims):
        super().__init__()
        self.width = dims.width
        self.input_conv = nn.ModuleList(nn.Conv2d(feature_width + 2, dims.width, 1) for _ in range(LEVELS))
        self.fuse_convs = nn.ModuleList(_Conv(dims) for _ in range(dims.rounds))

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        levels = [conv(torch.cat([level, _coordinates(level)], dim=1)) for conv, level in zip(self.input_conv, levels)]
        for conv in self.fuse_convs:
            levels = [conv(self._exchanged(levels, number)) for number in range(LEVELS)]
        return levels

    def _exchanged(self, levels: list[Tensor], number: int) -> Tensor:
        own, half = levels[number], self.width // 2
        above, below = levels[min(number + 1, LEVELS - 1)], levels[max(number - 1, 0)]
        third = half + self.width // 4
        size = own.shape[-1]
        return torch.cat([own[:, :half], _resized(above[:, third:], size), _resized(below[:, half:third], size)], dim=1)


class RegionPooling(nn.Module):
    """RoIAlign and a convolution per level, summed and projected to one vector, plus the box's position: -> [n,D]."""

    def __init__(self, out_width: int, dims: RegionDims):
        super().__init__()
        self.dims = dims
        self.pconvs = nn.ModuleList(nn.Conv2d(dims.width, dims.width, 3, padding=1) for _ in range(LEVELS))
        self.pos_embedd = nn.Sequential(
            nn.Linear(4, dims.position_width),
            nn.ReLU(),
            nn.LayerNorm(dims.position_width),
            nn.Linear(dims.position_width, dims.middle),
            nn.ReLU(),
            nn.LayerNorm(dims.middle),
        )
        self.flatten_linear = nn.Linear(dims.width * dims.bins**2, dims.middle)
        self.updims = nn.Linear(dims.middle, out_width)

    def forward(self, levels: list[Tensor], boxes: Tensor) -> Tensor:
        scaled = boxes * self.dims.box_scale  # [n,4]
        parts = [  # LEVELS x [n,C,bins,bins]
            conv(roi_align(level, scaled / stride, self.dims.bins))
            for conv, level, stride in zip(self.pconvs, levels, self.dims.strides)
        ]
        region = self.flatten_linear(functional.relu(sum(parts[1:], parts[0])).flatten(1))  # [n,middle]
        return self.updims(region + self.pos_embedd(boxes))  # [n,D]


class RegionEncoder(nn.Module):
    """Boxes on a picture's features -> embeddings in the decoder's space.

    `forward` takes features [1,4,N,Dv] (shallowest level first, patches in row-major order) and boxes [n,4]
    (x1,y1,x2,y2 in 0..1) and returns [n,D]. With features [P,4,N,Dv] of several pictures, `owners`, int64 [n], gives
    each box's picture.
    """

    def __init__(self, feature_width: int, out_width: int, dims: RegionDims):
        super().__init__()
        self.mlvl_fuse = LevelFusion(feature_width, dims)
        self.roi_align = RegionPooling(out_width, dims)

    def forward(self, features: Tensor, boxes: Tensor, owners: Tensor | None = None) -> Tensor:
        grid = round(features.shape[2] ** 0.5)
        maps = features.transpose(2, 3).reshape(*features.shape[:2], -1, grid, grid)  # [1,4,Dv,G,G]
        # 4 x [1,Dv,g,g], g = 8G, 4G, 2G, G
        levels = [_resized(maps[:, number], grid << (LEVELS - 1 - number)) for number in range(LEVELS)]
        fused = self.mlvl_fuse(levels)  # 4 x [1,C,g,g]
        return self.roi_align(fused if owners is None else [level[owners] for level in fused], boxes)


def _resized(x: Tensor, size: int) -> Tensor:
    if x.shape[-1] == size:
        return x
    return functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=True)


def _coordinates(x: Tensor) -> Tensor:
    """Two channels with x and y from -1 to 1: [B,D,H,H] -> [B,2,H,H]."""
    line = torch.linspace(-1, 1, x.shape[-1], device=x.device, dtype=x.dtype)
    y, x_ = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x_, y]).unsqueeze(0).expand(x.shape[0], -1, -1, -1)
