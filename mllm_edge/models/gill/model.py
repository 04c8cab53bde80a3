"""GILL: a frozen language model that reads pictures, retrieves them and has them drawn (Koh et al. 2023, arXiv
2305.17216).

A picture is four rows made of CLIP's pooled vector. States at eight picture tokens become a query for retrieval, the
text of a latent diffusion model, and a decision between the two. Parameters of the published files map one to one
(`original.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm_edge.models.blocks.unet import UNet, UNetDims
from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims
from mllm_edge.models.blocks.vit import VisionEncoder, VitDims
from mllm_edge.models.gill.heads import Heads, MapperDims
from mllm_edge.models.language.opt import TABLE, OptDims, opt
from mllm_edge.models.parts import Decoder, filled
from mllm_edge.models.plan import Checkpoint
from mllm_edge.models.text_to_image import TINY_TEXT, TINY_UNET, TINY_VAE

TOKENS = tuple(f"[IMG{number}]" for number in range(8))  # the last rows of the table
CLASS_TOKEN = "<|image|>"  # stands before them; no text has it
LM = "language_model."


@dataclass(frozen=True)
class GillDims:
    """The whole system's shape.

    Attributes:
        vision: CLIP, tapped after its last layer.
        language: OPT; the last eight tokens are the picture tokens.
        mapper: from their states to what the UNet reads.
        unet: of the diffusion model; it is taught on latents of its `side`.
        vae: of the same.
        rows: of a picture in the prompt.
        query_width: of what is looked for.
        decides: whether there is a head that decides between retrieving and generating.
    """

    vision: VitDims
    language: OptDims
    mapper: MapperDims
    unet: UNetDims
    vae: VaeDims
    rows: int = 4
    query_width: int = 256
    decides: bool = True

    @property
    def start(self) -> int:
        """The id of the first picture token."""
        return self.language.vocabulary - len(TOKENS)

    def heads(self) -> Heads:
        """The heads with fresh weights."""
        return Heads(self.mapper, self.language.width, self.query_width, self.decides)


class PooledEncoder(VisionEncoder):
    """CLIP's pooled vector: the class token after the last layer and a norm, [B,3,S,S] -> [B,D] (`pooler_output` of
    transformers, without CLIP's projection)."""

    def __init__(self, dims: VitDims):
        super().__init__(dims)
        self.post_layernorm = nn.LayerNorm(dims.width, eps=dims.eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        rows = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        pooled: Tensor = self.post_layernorm(rows[:, 0])
        return pooled


class Connector(nn.Module):
    """A pooled vector as rows of the prompt, and as what retrieval compares."""

    def __init__(self, dims: GillDims):
        super().__init__()
        self.shape = (dims.rows, dims.language.width)
        self.visual_embeddings = nn.Linear(dims.vision.width, dims.rows * dims.language.width)
        self.visual_fc = nn.Linear(dims.vision.width, dims.query_width)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """[B,Dv] -> [B,rows,D] and [B,d]."""
        return self.visual_embeddings(pooled).unflatten(-1, self.shape), self.visual_fc(pooled)


class Gill(nn.Module):
    """All parts but the diffusion model."""

    def __init__(self, dims: GillDims):
        super().__init__()
        self.dims = dims
        self.vision_encoder = PooledEncoder(dims.vision)
        self.connector = Connector(dims)
        self.heads = dims.heads()
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.language_model = opt(dims.language)


CONFIGS: dict[str, GillDims] = {
    "tiny": GillDims(
        # That of all tiny systems, whose layers it begins with, and a layer more
        VitDims(image_size=128, patch_size=16, width=192, layers=6, heads=3, mlp_width=768, tap=-1),
        OptDims(vocabulary=440, width=192, ffn_width=768, layers=4, heads=6, context=256),
        MapperDims(128, layers=2, mlp_width=256, queries=TINY_TEXT.length, out_width=TINY_TEXT.width),
        TINY_UNET,
        TINY_VAE,
        query_width=64,
    ),
    "6.7b": GillDims(
        VitDims(image_size=224, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096, tap=-1),
        OptDims(vocabulary=50274, width=4096, ffn_width=16384, layers=32, heads=32),
        MapperDims(),
        UNetDims(),
        VaeDims(),
    ),
}

SHIPPED = ("tiny",)  # configs whose weights ship with the package


def tensor_shapes(dims: GillDims) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the system, without allocating any.

    OPT's head is its table. `empty_text` is what the diffusion model reads for an empty prompt, [1,queries,out_width].
    """
    with torch.device("meta"):
        parts = {"": Gill(dims), "unet.": UNet(dims.unet), "vae_decoder.": VaeDecoder(dims.vae)}
        shapes = {
            f"{part}{n}": tuple(t.shape) for part, module in parts.items() for n, t in module.state_dict().items()
        }
    del shapes[f"{LM}lm_head.weight"]
    return {**shapes, "empty_text": (1, dims.mapper.queries, dims.mapper.out_width)}


def build(checkpoint: Checkpoint) -> nn.Module:
    """All parts but the diffusion model with the checkpoint's weights, in fp32."""
    return filled(Gill(checkpoint.dims), Decoder(checkpoint.tensors, f"{LM}{TABLE}", f"{LM}lm_head.weight"))
