"""GLaMM: LLaVA whose answers carry masks and whose questions carry boxes (Rasheed et al. 2024, arXiv 2311.03356)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mllm_edge.models.blocks.region import RegionDims, RegionEncoder
from mllm_edge.models.blocks.sam import SAM_VIT_B, SAM_VIT_H, SamDims, SamImageEncoder
from mllm_edge.models.blocks.sam_decoder import MaskDecoder, MaskDecoderDims, PromptEncoder
from mllm_edge.models.blocks.vit import VisionEncoder, VitDims
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.llava.model import CLIP_L_336, Llava, LlavaDims
from mllm_edge.models.llava.model import CONFIGS as LLAVA_CONFIGS
from mllm_edge.models.plan import Checkpoint

# In the order in which groundingLMM's train.py adds them after the trained vocabulary.
ADDED = ("<im_start>", "<im_end>", "<bbox>", "<point>", "[SEG]", "<p>", "</p>")


@dataclass(frozen=True)
class GlammDims:
    """The whole system's shape. `taps` are the CLIP hidden states (0 = before the first block) that regions are read
    from, shallowest first; the decoder's vocabulary counts the added tokens."""

    llava: LlavaDims
    taps: tuple[int, ...] = (14, 17, 20, 23)
    mask_encoder: SamDims = SAM_VIT_H
    mask_decoder: MaskDecoderDims = field(default_factory=MaskDecoderDims)
    region: RegionDims = field(default_factory=RegionDims)

    @property
    def first_added(self) -> int:
        """Id of the first added token."""
        return self.llava.language.vocabulary - len(ADDED)

    def added_id(self, token: str) -> int:
        """Id of one of `ADDED`."""
        return self.first_added + ADDED.index(token)


def grounding(llava: LlavaDims) -> LlavaDims:
    """A LLaVA's dims as GLaMM has them: seven more tokens, centre crop, its own template."""
    language = replace(llava.language, vocabulary=llava.language.vocabulary + len(ADDED))
    return replace(llava, language=language, fit="crop", template="glamm")


_7B = grounding(LlavaDims(CLIP_L_336, LlamaDims(32000, 4096, 11008, layers=32, heads=32, kv_heads=32, context=4096)))
CONFIGS: dict[str, GlammDims] = {
    "tiny": GlammDims(
        grounding(LLAVA_CONFIGS["tiny"]),
        taps=(2, 3, 4, 5),
        mask_encoder=SamDims(128, 8, 80, 4, 4, 320, window=7, global_layers=(1, 3), out_width=64),
        mask_decoder=MaskDecoderDims(grid=16, width=64, heads=4, mlp_width=96),
        region=RegionDims(24, 80, 32, groups=4, bins=4, strides=(3.5, 7.0, 14.0, 28.0)),  # the box fills the map
    ),
    "7b-lite": GlammDims(_7B, mask_encoder=SAM_VIT_B),
    "7b": GlammDims(_7B),
}
SHIPPED = ("tiny",)


class TappedEncoder(VisionEncoder):
    """CLIP with five taps: the last one feeds the connector, the others the region encoder."""

    def __init__(self, dims: VitDims, taps: tuple[int, ...]):
        super().__init__(dims)
        self.taps = taps

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[B,3,S,S] -> features [B,N,D] and levels [B,4,N,D], class token dropped."""
        x = self.pre_layrnorm(self.embeddings(pixel_values))
        levels = []
        for number, block in enumerate(self.encoder.layers, start=1):
            x = block(x)
            if number in self.taps:
                levels.append(x[:, 1:])
        return x[:, 1:], torch.stack(levels, dim=1)


class Projection(nn.Sequential):
    """The L-P projection (`text_hidden_fcs`): [n,D] states that foretell [SEG] -> [n,C] prompts."""

    def __init__(self, width: int, out_width: int):
        super().__init__(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, out_width))


class MaskHead(nn.Module):
    """Projection, prompt encoder and mask decoder: what one picture's [SEG] states become."""

    def __init__(self, dims: GlammDims):
        super().__init__()
        self.projection = Projection(dims.llava.language.width, dims.mask_decoder.width)
        self.prompt_encoder = PromptEncoder(dims.mask_decoder)
        self.mask_decoder = MaskDecoder(dims.mask_decoder)

    def forward(self, image_embedding: Tensor, seg_states: Tensor) -> Tensor:
        """[1,C,G,G] (or one per state) and [n,D] -> mask logits [n,4G,4G]."""
        prompts = self.projection(seg_states).unsqueeze(1)
        return self.mask_decoder(image_embedding, prompts, self.prompt_encoder)


class Glamm(Llava):
    """All parts, for training and as the reference of every parity check."""

    def __init__(self, dims: GlammDims):
        super().__init__(dims.llava)
        assert isinstance(dims.llava.vision, VitDims)
        self.glamm_dims = dims
        self.vision_encoder = TappedEncoder(dims.llava.vision, dims.taps)
        self.region_encoder = RegionEncoder(dims.llava.vision.width, dims.llava.language.width, dims.region)
        self.mask_encoder = SamImageEncoder(dims.mask_encoder)
        self.mask_head = MaskHead(dims)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[B,3,S,S] float32 -> [B,N,D] embeddings in the decoder's space."""
        features, _ = self.vision_encoder(pixel_values)
        embeds: Tensor = self.connector(features)
        return embeds


def tensor_shapes(dims: GlammDims) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor of the system, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Glamm(dims).state_dict().items()}


def build(checkpoint: Checkpoint) -> Glamm:
    """The PyTorch reference in fp32 with the checkpoint's weights, in eval mode."""
    model = Glamm(checkpoint.dims)
    model.load_state_dict({name: checkpoint.tensors[name].float() for name in tensor_shapes(checkpoint.dims)})
    return model.eval()
