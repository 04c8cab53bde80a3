"""The autoencoder of latent diffusion as Stable Diffusion 1.5 has it (Rombach et al. 2022, arXiv 2112.10752), in its
two halves, which are stages of their own.

Parameter names are those of diffusers' `AutoencoderKL`, of which each half has its part; a test shows equal outputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.residual import Downsample, ResidualBlock, Upsample
from mllm_edge.models.blocks.unet import Heads
from mllm_edge.models.fields import Fields, check_fixed, counts, names, real, whole

EPS = 1e-6  # of all its norms
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}
# Files from before diffusers 0.17 name the attention so.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class VaeDims:
    """Shape of an autoencoder; the defaults are Stable Diffusion 1.5's.

    Attributes:
        channels: of a picture, in and out.
        latent_channels: of a latent.
        widths: of each level, from the full picture down.
        layers: residual blocks of a level of the encoder; the decoder has one more.
        groups: of the group norms.
        scale: what a latent is multiplied with before diffusion; neither half does that.
        side: of the pictures that it was taught on.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scale: float = 0.18215
    side: int = 512

    @property
    def shrinks(self) -> int:
        """Pixels along a side for each cell of the latent."""
        return 1 << len(self.widths) - 1


def vae_dims(config: Fields, where: Path) -> VaeDims:
    """Read diffusers' `config.json` of an autoencoder.

    Raises:
        BadInput: names a field whose value this autoencoder has not, or numbers that do not go together.
    """
    widths = counts(config, "block_out_channels", where)
    groups, channels = whole(config, "norm_num_groups", where, 32), whole(config, "in_channels", where, 3)
    check_fixed(config, {**FIXED, "out_channels": (channels,)}, where)
    names(config, "down_block_types", where, ["DownEncoderBlock2D"], len(widths))
    names(config, "up_block_types", where, ["UpDecoderBlock2D"], len(widths))
    if wrong := [width for width in widths if width % groups]:
        raise BadInput(f"{where} has width {wrong[0]}, which {groups} groups do not divide; copy it again")
    return VaeDims(
        channels=channels,
        latent_channels=whole(config, "latent_channels", where, 4),
        widths=widths,
        layers=whole(config, "layers_per_block", where, 1, most=100),
        groups=groups,
        scale=real(config, "scaling_factor", where, 0.18215),
        side=whole(config, "sample_size", where, 512),
    )


def vae_name(name: str) -> str:
    """A tensor's name as it is now, whichever way its file is old."""
    pattern = r"((?:en|de)coder\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"
    return re.sub(pattern, lambda found: found[1] + _OLDER[found[2]], name)


class _MiddleAttention(Heads):
    """Cells [B,C,h,w] look at each other, with one head."""

    def __init__(self, width: int, groups: int):
        super().__init__(width, 1, width, bias=True)
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        cells = self.group_norm(x).flatten(2).transpose(1, 2)  # [B,h*w,C]
        return x + self.attend(cells, cells).transpose(1, 2).reshape(x.shape)


class _Middle(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([_MiddleAttention(width, groups)])
        self.resnets = nn.ModuleList(ResidualBlock(width, width, groups, EPS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class _Level(nn.Module):
    """Residual blocks, and what changes the sides after them."""

    def __init__(self, before: int, width: int, layers: int, groups: int):
        super().__init__()
        inputs = [before] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(ResidualBlock(many, width, groups, EPS) for many in inputs)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("resnets", "downsamplers", "upsamplers"):
            for block in getattr(self, name, []):
                x = block(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, dims: VaeDims):
        super().__init__()
        self.conv_in = nn.Conv2d(dims.channels, dims.widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _Level(before, width, dims.layers, dims.groups)
            for before, width in zip(dims.widths[:1] + dims.widths, dims.widths)
        )
        for level, width in zip(list(self.down_blocks)[:-1], dims.widths):
            level.downsamplers = nn.ModuleList([Downsample(width, both=False)])
        self.mid_block = _Middle(dims.widths[-1], dims.groups)
        self.conv_norm_out = nn.GroupNorm(dims.groups, dims.widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(dims.widths[-1], 2 * dims.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class _Decoder(nn.Module):
    def __init__(self, dims: VaeDims):
        super().__init__()
        widths = dims.widths[::-1]
        self.conv_in = nn.Conv2d(dims.latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            _Level(before, width, dims.layers + 1, dims.groups) for before, width in zip(widths[:1] + widths, widths)
        )
        for level, width in zip(list(self.up_blocks)[:-1], widths):
            level.upsamplers = nn.ModuleList([Upsample(width)])
        self.mid_block = _Middle(widths[0], dims.groups)
        self.conv_norm_out = nn.GroupNorm(dims.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], dims.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return out


class VaeEncoder(nn.Module):
    """A picture as a latent, without `VaeDims.scale`."""

    def __init__(self, dims: VaeDims):
        super().__init__()
        self.encoder = _Encoder(dims)
        self.quant_conv = nn.Conv2d(2 * dims.latent_channels, 2 * dims.latent_channels, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [B,3,H,W] in -1..1, sides that `shrinks` divides -> the likeliest latent, float32 [B,C,h,w]."""
        return self.distribution(pixels)[0]

    def distribution(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, -30 to 20, of a picture's latent, float32 [B,C,h,w] each."""
        mean, spread = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, spread.clamp(-30.0, 20.0)


class VaeDecoder(nn.Module):
    """A latent as a picture."""

    def __init__(self, dims: VaeDims):
        super().__init__()
        self.decoder = _Decoder(dims)
        self.post_quant_conv = nn.Conv2d(dims.latent_channels, dims.latent_channels, 1)

    def forward(self, latent: Tensor) -> Tensor:
        """float32 [B,C,h,w], divided by `VaeDims.scale` -> float32 [B,3,H,W], about -1..1."""
        pixels: Tensor = self.decoder(self.post_quant_conv(latent))
        return pixels
