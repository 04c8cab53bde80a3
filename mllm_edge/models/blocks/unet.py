"""The UNet of latent diffusion as Stable Diffusion 1.5 has it (Rombach et al. 2022, arXiv 2112.10752).

Written here rather than taken from diffusers, because the graph must be static, take a further residual and hold few
attention scores at once. Parameter names are those of diffusers' `UNet2DConditionModel`; a test shows equal outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.residual import Downsample, ResidualBlock, Upsample
from mllm_edge.models.fields import Fields, check_fixed, counts, names, real, whole

SCORES = 1 << 26  # attention scores held at once of one latent, in elements (256 MB in fp32)
FLOAT32 = ("time_proj",)  # modules that fp16 would ruin: the sine of 981 in steps of a half

DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu",),
    "addition_embed_type": (None,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0, 0.0),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
    "use_linear_projection": (False,),
}


@dataclass(frozen=True)
class UNetDims:
    """Shape of a UNet; the defaults are Stable Diffusion 1.5's.

    Attributes:
        channels: of the latent, with all that stands beside it.
        out_channels: of the noise that is predicted.
        widths: of each level, from the full latent down.
        layers: residual blocks of a level on the way down; up has one more.
        attends: whether a level reads the text, on the way down; up is its mirror.
        heads: of a level's attention.
        text_width: of the text's rows.
        groups: of the group norms.
        side: of the latent that it was taught on.
        eps: of the group norms, but those in front of attention.
    """

    channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2
    attends: tuple[bool, ...] = (True, True, True, False)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    text_width: int = 768
    groups: int = 32
    side: int = 64
    eps: float = 1e-5

    @property
    def embedded(self) -> int:
        """Width of a timestep's embedding."""
        return 4 * self.widths[0]


def unet_dims(config: Fields, where: Path) -> UNetDims:
    """Read diffusers' `config.json` of a UNet.

    Raises:
        BadInput: names a field whose value this UNet has not, or numbers that do not go together.
    """
    check_fixed(config, FIXED, where)
    widths = counts(config, "block_out_channels", where)
    levels, groups = len(widths), whole(config, "norm_num_groups", where, 32)
    down = [DOWN[name] for name in names(config, "down_block_types", where, DOWN, levels)]
    up = [UP[name] for name in names(config, "up_block_types", where, UP, levels)]
    # The field's name is wrong in diffusers and stays so: it counts the heads.
    heads = counts(config, "attention_head_dim", where, levels)
    if up != down[::-1]:
        raise BadInput(f"{where} has levels that read the text on one way only; use another checkpoint")
    if wrong := [width for width, many in zip(widths, heads) if width % groups or width % many]:
        raise BadInput(f"{where} has width {wrong[0]}, which its groups or heads do not divide; copy it again")
    return UNetDims(
        channels=whole(config, "in_channels", where),
        out_channels=whole(config, "out_channels", where),
        widths=widths,
        layers=whole(config, "layers_per_block", where, most=100),
        attends=tuple(down),
        heads=heads,
        text_width=whole(config, "cross_attention_dim", where),
        groups=groups,
        side=whole(config, "sample_size", where, 64),
        eps=real(config, "norm_eps", where, 1e-5),
    )


class _Sines(nn.Module):
    """Cosines and sines of a timestep at frequencies 1 to 1/10000: [B] -> [B,D]."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.rates: Tensor
        self.register_buffer("rates", torch.exp(torch.arange(half) * (-math.log(10000.0) / half)), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * self.rates  # [B,D/2]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _TimeEmbedding(nn.Module):
    def __init__(self, width: int, embedded: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, embedded)
        self.linear_2 = nn.Linear(embedded, embedded)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(functional.silu(self.linear_1(x)))
        return out


class Heads(nn.Module):
    """Multi-head attention, for modules whose parameters stand beside its own."""

    def __init__(self, width: int, heads: int, read_width: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(read_width, width, bias=bias)
        self.to_v = nn.Linear(read_width, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def attend(self, x: Tensor, read: Tensor) -> Tensor:
        """Of rows [B,N,D] over those of `read` [B,T,Dr]: -> [B,N,D]."""
        batch, rows, width = x.shape
        depth = width // self.heads
        q = self.to_q(x).unflatten(-1, (self.heads, depth)).transpose(1, 2) * depth**-0.5  # [B,H,N,d]
        k = self.to_k(read).unflatten(-1, (self.heads, depth)).permute(0, 2, 3, 1)  # [B,H,d,T]
        v = self.to_v(read).unflatten(-1, (self.heads, depth)).transpose(1, 2)  # [B,H,T,d]
        part = max(1, SCORES // (rows * read.shape[1]))  # heads at a time
        mixed = [torch.softmax(a @ b, dim=-1) @ c for a, b, c in zip(*(t.split(part, dim=1) for t in (q, k, v)))]
        joined = mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)
        out: Tensor = self.to_out[0](joined.transpose(1, 2).reshape(batch, rows, width))
        return out


class _Attention(Heads):
    def forward(self, x: Tensor, read: Tensor) -> Tensor:
        return self.attend(x, read)


class _Gated(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        values, gates = self.proj(x).chunk(2, dim=-1)
        out: Tensor = values * functional.gelu(gates)
        return out


class _FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(_Gated(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, text_width: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = _Attention(width, heads, width)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = _Attention(width, heads, text_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = _FeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), text)
        out: Tensor = x + self.ff(self.norm3(x))
        return out


class SpatialTransformer(nn.Module):
    """Cells [B,C,h,w] look at each other and at the text [B,T,Dt]."""

    def __init__(self, width: int, dims: UNetDims, heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(dims.groups, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([_TransformerBlock(width, heads, dims.text_width)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        cells = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # [B,h*w,C]
        for block in self.transformer_blocks:
            cells = block(cells, text)
        out: Tensor = x + self.proj_out(cells.transpose(1, 2).unflatten(-1, x.shape[-2:]))
        return out


class _Level(nn.Module):
    """Residual blocks of a level, each with its attention where the level reads the text."""

    def __init__(self, inputs: Sequence[int], width: int, dims: UNetDims, heads: int, attends: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(many, width, dims.groups, dims.eps, dims.embedded) for many in inputs
        )
        if attends:
            self.attentions = nn.ModuleList(SpatialTransformer(width, dims, heads) for _ in inputs)
        self.attends = attends

    def step(self, number: int, x: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        """Block `number`: [B,Ci,h,w] -> [B,C,h,w]."""
        x = self.resnets[number](x, embedding)
        return self.attentions[number](x, text) if self.attends else x


class _Down(_Level):
    def __init__(self, dims: UNetDims, level: int):
        width, before = dims.widths[level], dims.widths[max(0, level - 1)]
        inputs = [before] + [width] * (dims.layers - 1)
        super().__init__(inputs, width, dims, dims.heads[level], dims.attends[level])
        last = level == len(dims.widths) - 1
        self.downsamplers = None if last else nn.ModuleList([Downsample(width, both=True)])

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor) -> list[Tensor]:
        """All that the way up will read of this level, in order; the last one goes further down."""
        found: list[Tensor] = []
        for number in range(len(self.resnets)):
            x = self.step(number, x, embedding, text)
            found.append(x)
        return found if self.downsamplers is None else [*found, self.downsamplers[0](x)]


class _Up(_Level):
    def __init__(self, dims: UNetDims, level: int):
        widths, width = dims.widths, dims.widths[level]
        below, above = widths[min(level + 1, len(widths) - 1)], widths[max(0, level - 1)]
        passed, skipped = [below] + [width] * dims.layers, [width] * dims.layers + [above]
        inputs = [a + b for a, b in zip(passed, skipped, strict=True)]
        super().__init__(inputs, width, dims, dims.heads[level], dims.attends[level])
        self.upsamplers = nn.ModuleList([Upsample(width)]) if level else None

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, text: Tensor) -> Tensor:
        """Takes what it reads from the end of `skips`."""
        for number in range(len(self.resnets)):
            x = self.step(number, torch.cat([x, skips.pop()], dim=1), embedding, text)
        return x if self.upsamplers is None else self.upsamplers[0](x, skips[-1].shape[-2:])


class _Middle(_Level):
    def __init__(self, dims: UNetDims):
        width = dims.widths[-1]
        super().__init__([width, width], width, dims, dims.heads[-1], attends=False)
        self.attentions = nn.ModuleList([SpatialTransformer(width, dims, dims.heads[-1])])

    def forward(self, x: Tensor, embedding: Tensor, text: Tensor) -> Tensor:
        x = self.attentions[0](self.step(0, x, embedding, text), text)
        return self.step(1, x, embedding, text)


class UNet(nn.Module):
    """The noise in a latent."""

    def __init__(self, dims: UNetDims):
        super().__init__()
        levels = range(len(dims.widths))
        self.conv_in = nn.Conv2d(dims.channels, dims.widths[0], 3, padding=1)
        self.time_proj = _Sines(dims.widths[0])
        self.time_embedding = _TimeEmbedding(dims.widths[0], dims.embedded)
        self.down_blocks = nn.ModuleList(_Down(dims, level) for level in levels)
        self.mid_block = _Middle(dims)
        self.up_blocks = nn.ModuleList(_Up(dims, level) for level in reversed(levels))
        self.conv_norm_out = nn.GroupNorm(dims.groups, dims.widths[0], eps=dims.eps)
        self.conv_out = nn.Conv2d(dims.widths[0], dims.out_channels, 3, padding=1)

    def forward(self, latent: Tensor, timestep: Tensor, text: Tensor, residual: Tensor | None = None) -> Tensor:
        """The noise, float32 [B,Co,h,w].

        Args:
            latent: float32 [B,Ci,h,w], any sides.
            timestep: float32 [B] or [1], which may be fractional.
            text: float32 [B,T,Dt].
            residual: float32 [B,widths[0],h,w] or [1,...], added to what the first convolution gives, before the way
                up reads that (SmartEdit, `unet_2d_condition_ZeroConv.py`).
        """
        embedding = self.time_embedding(self.time_proj(timestep))  # [B,E]
        x = self.conv_in(latent)
        skips = [x if residual is None else x + residual]
        for down in self.down_blocks:
            skips += down(skips[-1], embedding, text)
        x = self.mid_block(skips[-1], embedding, text)
        for up in self.up_blocks:
            x = up(x, skips, embedding, text)
        noise: Tensor = self.conv_out(functional.silu(self.conv_norm_out(x)))
        return noise
