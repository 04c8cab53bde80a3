"""SAM's prompt encoder and mask decoder (segment_anything/modeling/{prompt_encoder,transformer,mask_decoder}.py).

GLaMM's change is a prompt given as an embedding, in place of a point's. The three masks of SAM's multi-mask output and
its IoU head are left out: GLaMM neither uses nor trains them. Parameter names are the original's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.models.blocks.sam import LayerNorm2d

MASK_TOKENS = 4  # only the first one's mask is used


@dataclass(frozen=True)
class MaskDecoderDims:
    """Shape of a mask decoder; `grid` (cells per side) and `width` (channels) are the image embedding's."""

    grid: int = 64
    width: int = 256
    heads: int = 8
    mlp_width: int = 2048
    depth: int = 2


class FourierPositions(nn.Module):
    """Random Fourier features of points in 0..1: [...,2] (x, y) -> [...,width]."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, places: Tensor) -> Tensor:
        matrix: Tensor = self.positional_encoding_gaussian_matrix  # type: ignore[assignment]
        turns = 2 * math.pi * ((2 * places - 1) @ matrix)  # [...,width/2]
        return torch.cat([turns.sin(), turns.cos()], dim=-1)


class PromptEncoder(nn.Module):
    """Embeddings of points and boxes, position features of the grid, and the "no mask prompt" embedding."""

    def __init__(self, dims: MaskDecoderDims):
        super().__init__()
        self.dims = dims
        self.pe_layer = FourierPositions(dims.width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, dims.width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, dims.width)
        self.no_mask_embed = nn.Embedding(1, dims.width)

    def points(self, places: Tensor) -> Tensor:
        """Points inside objects: [n,2] in 0..1 -> [n,2,C], each followed by SAM's padding point."""
        inside = self.pe_layer(places) + self.point_embeddings[1].weight  # [n,C]
        return torch.stack([inside, self.not_a_point_embed.weight.expand_as(inside)], dim=1)

    def boxes(self, corners: Tensor) -> Tensor:
        """Boxes: [n,4] x1,y1,x2,y2 in 0..1 -> [n,2,C]."""
        first, second = self.pe_layer(corners[:, :2]), self.pe_layer(corners[:, 2:])  # [n,C] each
        return torch.stack([first + self.point_embeddings[2].weight, second + self.point_embeddings[3].weight], dim=1)

    def dense_positions(self) -> Tensor:
        """Fourier features of the cells' centers: [1,G*G,C], row-major."""
        device = self.no_mask_embed.weight.device
        centers = (torch.arange(self.dims.grid, device=device, dtype=torch.float32) + 0.5) / self.dims.grid
        places = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), dim=-1)  # [G,G,2]
        return self.pe_layer(places).reshape(1, -1, self.dims.width)


class CrossAttention(nn.Module):
    """Attention in `width // shrink` channels: q [n,T,C], k and v [m,S,C] with m = n or 1 -> [n,T,C]."""

    def __init__(self, width: int, heads: int, shrink: int = 1):
        super().__init__()
        inner = width // shrink
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self._split(self.q_proj(q)), self._split(self.k_proj(k)), self._split(self.v_proj(v))
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5  # [n,H,T,S]
        mixed = (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)  # [n,T,C/shrink]
        return self.out_proj(mixed)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)  # [n,H,T,d]


class ReluMlp(nn.Module):
    """Two linears with ReLU between."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(functional.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Tokens [n,T,C] attend to themselves and to the cells [m,N,C], then the cells attend to the tokens."""

    def __init__(self, dims: MaskDecoderDims, first: bool):
        super().__init__()
        self.first = first
        self.self_attn = CrossAttention(dims.width, dims.heads)
        self.norm1 = nn.LayerNorm(dims.width)
        self.cross_attn_token_to_image = CrossAttention(dims.width, dims.heads, 2)
        self.norm2 = nn.LayerNorm(dims.width)
        self.mlp = ReluMlp(dims.width, dims.mlp_width)
        self.norm3 = nn.LayerNorm(dims.width)
        self.norm4 = nn.LayerNorm(dims.width)
        self.cross_attn_image_to_token = CrossAttention(dims.width, dims.heads, 2)

    def forward(self, tokens: Tensor, cells: Tensor, token_pe: Tensor, cell_pe: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pe
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.norm1(tokens)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, cells + cell_pe, cells))
        tokens = self.norm3(tokens + self.mlp(tokens))
        cells = cells + self.cross_attn_image_to_token(cells + cell_pe, tokens + token_pe, tokens)
        return tokens, self.norm4(cells)


class TwoWayTransformer(nn.Module):
    """Tokens [n,T,C] and cells [1,N,C] -> both, [n,T,C] and [n,N,C]."""

    def __init__(self, dims: MaskDecoderDims):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(dims, number == 0) for number in range(dims.depth))
        self.final_attn_token_to_image = CrossAttention(dims.width, dims.heads, 2)
        self.norm_final_attn = nn.LayerNorm(dims.width)

    def forward(self, prompt: Tensor, cells: Tensor, cell_pe: Tensor) -> tuple[Tensor, Tensor]:
        tokens = prompt
        for layer in self.layers:
            tokens, cells = layer(tokens, cells, prompt, cell_pe)
        seen = self.final_attn_token_to_image(tokens + prompt, cells + cell_pe, cells)
        return self.norm_final_attn(tokens + seen), cells


class HyperNetwork(nn.Module):
    """Three linears with ReLU between: a mask token [n,C] -> the weights [n,C/8] of its mask over the features."""

    def __init__(self, width: int):
        super().__init__()
        sizes = [width, width, width, width // 8]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class MaskDecoder(nn.Module):
    """Image embedding and prompts -> mask logits at a quarter of the encoder's resolution."""

    def __init__(self, dims: MaskDecoderDims):
        super().__init__()
        width = dims.width
        self.transformer = TwoWayTransformer(dims)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASK_TOKENS, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList([HyperNetwork(width)])

    def forward(self, image_embedding: Tensor, prompts: Tensor, prompt_encoder: PromptEncoder) -> Tensor:
        """Masks of n prompts on one picture, or on n pictures.

        Args:
            image_embedding: [1,C,G,G], or [n,C,G,G].
            prompts: sparse prompts [n,P,C].
            prompt_encoder: provides the grid's position features and the "no mask" embedding.

        Returns:
            Logits [n,4G,4G].
        """
        grid = image_embedding.shape[-1]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight])  # [1+MASK_TOKENS,C]
        tokens = torch.cat([own.unsqueeze(0).expand(prompts.shape[0], -1, -1), prompts], dim=1)  # [n,1+MASK_TOKENS+P,C]
        # [1,G*G,C] or [n,G*G,C]
        cells = image_embedding.flatten(2).transpose(1, 2) + prompt_encoder.no_mask_embed.weight
        tokens, cells = self.transformer(tokens, cells, prompt_encoder.dense_positions())  # cells: [n,G*G,C]
        features = self.output_upscaling(cells.transpose(1, 2).unflatten(2, (grid, grid)))  # [n,C/8,4G,4G]
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1])  # [n,C/8]; token 0 is the IoU token
        # [n,1,4G,4G]
        masks: Tensor = (weights.unsqueeze(1) @ features.flatten(2)).unflatten(2, (4 * grid, 4 * grid))
        return masks.squeeze(1)
