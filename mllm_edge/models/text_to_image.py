"""The small text-to-image diffusion model that GILL tiny draws with and SmartEdit tiny starts from.

Stable Diffusion 1.5's parts and names at small dims: an autoencoder, a UNet that reads text, CLIP's text encoder. About
13 MB in fp16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mllm_edge.models.blocks.unet import UNetDims
from mllm_edge.models.blocks.vae import VaeDims

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TextDims:
    """Shape of a text encoder as CLIP's (Radford et al. 2021).

    Attributes:
        vocabulary: most tokens; the tokenizer may have fewer.
        width: of its rows.
        layers: of its transformer.
        heads: of a layer's attention.
        hidden: width inside a layer's feed-forward part.
        length: rows; shorter texts are filled up with end tokens, longer ones cut.
    """

    vocabulary: int = 300
    width: int = 128
    layers: int = 3
    heads: int = 4
    hidden: int = 512
    length: int = 32  # three objects with all their attributes have 30 words


TINY_VAE = VaeDims(widths=(24, 48, 96), layers=1, groups=8, scale=1.0, side=64)  # the scale is measured: see the part
TINY_TEXT = TextDims()
TINY_UNET = UNetDims(
    widths=(48, 96, 112),
    layers=1,
    attends=(False, True, True),
    heads=(4, 4, 4),
    text_width=TINY_TEXT.width,
    groups=16,
    side=TINY_VAE.side // TINY_VAE.shrinks,
)
BETAS, TRAIN_STEPS = (0.00085, 0.012), 1000  # Stable Diffusion's, of both sizes


def text_encoder(dims: TextDims) -> nn.Module:
    """CLIP's text encoder with random weights: int64 [B,length] -> `last_hidden_state`, float32 [B,length,width]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=dims.vocabulary,
            hidden_size=dims.width,
            intermediate_size=dims.hidden,
            num_hidden_layers=dims.layers,
            num_attention_heads=dims.heads,
            max_position_embeddings=dims.length,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
