"""The CLIP vision transformer, cut at the tapped layer.

Reimplemented rather than taken from transformers, because the exported graph must be static, free of framework
switches and end at the tapped block. Parameter names are those of `transformers.CLIPVisionModel` below
`vision_model.`; a test shows equal outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class VitDims:
    """Shape of a CLIP vision transformer. `tap` indexes Hugging Face's `hidden_states` (0 = before the first block)."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    tap: int = -2
    eps: float = 1e-5
    activation: str = "quick_gelu"

    @property
    def depth(self) -> int:
        """Number of blocks that run: those up to the tapped hidden state."""
        return self.tap if self.tap >= 0 else self.layers + 1 + self.tap

    @property
    def patches(self) -> int:
        """Number of patch tokens N (without the class token)."""
        return (self.image_size // self.patch_size) ** 2


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGelu, "gelu": nn.GELU}


class Embeddings(nn.Module):
    """Patch convolution without bias, class token, learned positions: [B,3,S,S] -> [B,1+N,D]."""

    def __init__(self, dims: VitDims):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(dims.width) * 0.02)
        self.patch_embedding = nn.Conv2d(3, dims.width, dims.patch_size, dims.patch_size, bias=False)
        self.position_embedding = nn.Embedding(dims.patches + 1, dims.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B,N,D]
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)  # [B,1,D]
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


class Attention(nn.Module):
    """Multi-head self-attention as plain MatMul and Softmax, which every engine fuses."""

    def __init__(self, dims: VitDims):
        super().__init__()
        self.heads = dims.heads
        self.q_proj = nn.Linear(dims.width, dims.width)
        self.k_proj = nn.Linear(dims.width, dims.width)
        self.v_proj = nn.Linear(dims.width, dims.width)
        self.out_proj = nn.Linear(dims.width, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = (batch, tokens, self.heads, width // self.heads)
        q = self.q_proj(x).view(split).transpose(1, 2) * (width // self.heads) ** -0.5  # [B,H,T,d]
        k = self.k_proj(x).view(split).permute(0, 2, 3, 1)  # [B,H,d,T]
        v = self.v_proj(x).view(split).transpose(1, 2)  # [B,H,T,d]
        mixed = torch.softmax(q @ k, dim=-1) @ v  # [B,H,T,d]
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two linears with an activation between."""

    def __init__(self, dims: VitDims):
        super().__init__()
        self.fc1 = nn.Linear(dims.width, dims.mlp_width)
        self.activation = ACTIVATIONS[dims.activation]()
        self.fc2 = nn.Linear(dims.mlp_width, dims.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dims: VitDims):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(dims.width, eps=dims.eps)
        self.self_attn = Attention(dims)
        self.layer_norm2 = nn.LayerNorm(dims.width, eps=dims.eps)
        self.mlp = Mlp(dims)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The blocks up to the tap: [B,1+N,D] -> the same."""

    def __init__(self, dims: VitDims):
        super().__init__()
        self.layers = nn.ModuleList(Block(dims) for _ in range(dims.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


class VisionEncoder(nn.Module):
    """CLIP up to the tapped hidden state, class token dropped: [B,3,S,S] -> [B,N,D] (LLaVA `clip_encoder.py`)."""

    def __init__(self, dims: VitDims):
        super().__init__()
        self.embeddings = Embeddings(dims)
        self.pre_layrnorm = nn.LayerNorm(dims.width, eps=dims.eps)  # sic: the published name
        self.encoder = Encoder(dims)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))[:, 1:]
