"""LLaVA: CLIP -> connector -> splice into a LLaMA decoder (Liu et al. 2023, arXiv 2304.08485 and 2310.03744)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm_edge.models.blocks.connectors import connector, image_tokens
from mllm_edge.models.blocks.encoders import EncoderDims, vision_encoder
from mllm_edge.models.blocks.mobilenet import MobileNetDims
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.language.llama import LlamaDims, llama
from mllm_edge.models.plan import Checkpoint

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_INDEX = -200  # placeholder id for a picture's embeddings (llava/constants.py)


@dataclass(frozen=True)
class LlavaDims:
    """The whole system's shape.

    `merge` is the side of the square of neighbouring features whose embeddings are averaged into one; `tokens` are the
    rows of a connector that resamples (`blocks/connectors.py`; 0: it does not); `fit` and
    `resample` are how a picture is made square; `template` names an entry of `PROMPTS`; `marked` pictures stand between
    two tokens in the prompt.
    """

    vision: EncoderDims
    language: LlamaDims
    connector: str = "mlp2x_gelu"
    merge: int = 1
    tokens: int = 0
    fit: str = "pad"
    template: str = "vicuna_v1"
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD
    resample: str = "bicubic"
    marked: bool = False

    @property
    def image_tokens(self) -> int:
        """Token positions that a picture takes in the prompt."""
        return image_tokens(self.connector, self.vision.patches, self.merge, self.tokens)

    def projector(self) -> nn.Sequential:
        """The connector between encoder and decoder, freshly initialized."""
        wide = self.vision.width, self.language.width
        return connector(self.connector, *wide, self.vision.patches, self.merge, self.tokens)


CLIP_L_336 = VitDims(image_size=336, patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)

CONFIGS: dict[str, LlavaDims] = {
    "tiny": LlavaDims(
        vision=VitDims(image_size=128, patch_size=16, width=192, layers=6, heads=3, mlp_width=768),
        language=LlamaDims(vocabulary=768, width=256, ffn_width=512, layers=4, heads=4, kv_heads=2, context=1024),
    ),
    "smol": LlavaDims(
        vision=MobileNetDims(image_size=288),
        language=LlamaDims(
            49152, 576, 1536, layers=30, heads=9, kv_heads=3, context=8192, rope_theta=100_000.0, tied=True
        ),
        connector="mlp3x_gelu",
        merge=3,
        template="chatml_smollm",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ),
    "1b": LlavaDims(CLIP_L_336, LlamaDims(32000, 2048, 5632, layers=22, heads=32, kv_heads=4, context=4096)),
    "7b": LlavaDims(CLIP_L_336, LlamaDims(32000, 4096, 11008, layers=32, heads=32, kv_heads=32, context=4096)),
    "13b": LlavaDims(CLIP_L_336, LlamaDims(32000, 5120, 13824, layers=40, heads=40, kv_heads=40, context=4096)),
}

SHIPPED = ("tiny", "smol")  # configs whose weights ship with the package, the default first


class Llava(nn.Module):
    """The three parts, for training and as the reference of every parity check."""

    def __init__(self, dims: LlavaDims):
        super().__init__()
        self.dims = dims
        self.vision_encoder = vision_encoder(dims.vision)
        self.connector = dims.projector()
        self.language_model: Any = llama(dims.language)  # transformers' class, or peft's around it

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] float32 -> [B,N,D] embeddings in the decoder's space."""
        embeds: Tensor = self.connector(self.vision_encoder(pixel_values))
        return embeds

    def splice(self, ids: Tensor, image_embeds: Tensor) -> Tensor:
        """Token embeddings with each row of consecutive `IMAGE_INDEX` filled by `image_embeds` in order.

        Args:
            ids: int64 [B,T]; a picture takes N positions holding IMAGE_INDEX (as in transformers' port).
            image_embeds: [P,N,D] for the P pictures of the batch, in reading order.

        Returns:
            [B,T,D].
        """
        here = ids == IMAGE_INDEX  # [B,T]
        embeds: Tensor = self.language_model.get_input_embeddings()(ids.masked_fill(here, 0))  # [B,T,D]
        return embeds.masked_scatter(here.unsqueeze(-1), image_embeds.to(embeds.dtype))


def tensor_shapes(dims: LlavaDims) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the system, without allocating any."""
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        parts = {
            "vision_encoder": vision_encoder(dims.vision),
            "connector": dims.projector(),
            "language_model": llama(dims.language),
        }
    for prefix, module in parts.items():
        shapes |= {f"{prefix}.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if dims.language.tied:
        del shapes["language_model.lm_head.weight"]
    return shapes


def build(checkpoint: Checkpoint) -> Llava:
    """The PyTorch reference in fp32 with the checkpoint's weights, in eval mode."""
    model = Llava(checkpoint.dims)
    names = tensor_shapes(checkpoint.dims)
    state = {name: checkpoint.tensors[name].float() for name in names}
    if checkpoint.dims.language.tied:
        state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()
