"""MobileNetV2 as a vision encoder (Sandler et al. 2018): each cell of its last feature map is a token.

The network is transformers' `MobileNetV2Model`; this module adapts it to LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

_STRIDE = 32
_LAST_CHANNELS = 1280


@dataclass(frozen=True)
class MobileNetDims:
    """Shape of a MobileNetV2 of width 1.0 without its classifier. `image_size` is in pixels."""

    image_size: int = 224
    eps: float = 1e-5

    @property
    def width(self) -> int:
        """Channels of a feature."""
        return _LAST_CHANNELS

    @property
    def patches(self) -> int:
        """Number of features N."""
        return (self.image_size // _STRIDE) ** 2


class MobileNetEncoder(nn.Module):
    """Features in row-major order: [B,3,S,S] -> [B,N,1280]."""

    def __init__(self, dims: MobileNetDims):
        super().__init__()
        from transformers import MobileNetV2Config, MobileNetV2Model

        config = MobileNetV2Config(image_size=dims.image_size, tf_padding=False, layer_norm_eps=dims.eps)
        self.network = MobileNetV2Model(config, add_pooling_layer=False)

    def train(self, mode: bool = True) -> MobileNetEncoder:
        """Stay in evaluation mode: batch norm uses the statistics of the pretrained weights."""
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.network(pixel_values).last_hidden_state  # [B,1280,S/32,S/32]
        return features.flatten(2).transpose(1, 2)


def from_torchvision_order(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights of torchvision's (and older) MobileNetV2 to those of `MobileNetEncoder`.

    Both list the same layers in the same order under other names.

    Args:
        weights: A state dict whose names begin with "features."; others (a classifier) are left out.

    Raises:
        ValueError: The layers are not those of MobileNetV2 of width 1.0.
    """
    given = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    with torch.device("meta"):
        wanted = MobileNetEncoder(MobileNetDims()).state_dict()
    shapes = [tuple(tensor.shape) for tensor in wanted.values()]
    if [tuple(tensor.shape) for tensor in given.values()] != shapes:
        raise ValueError("these are not the weights of a MobileNetV2 of width 1.0")
    return dict(zip(wanted, given.values(), strict=True))
