"""GLaMM: LLaVA whose answers carry masks and whose questions carry boxes (Rasheed et al. 2024, arXiv 2311.03356)."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.bundle import Generation, ImagePreprocessing, TensorSpec
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.region import RegionDims, RegionEncoder
from mllm_edge.models.blocks.sam import SAM_VIT_B, SAM_VIT_H, SamDims, SamImageEncoder
from mllm_edge.models.blocks.sam_decoder import MaskDecoder, MaskDecoderDims, PromptEncoder
from mllm_edge.models.blocks.vit import VisionEncoder, VitDims
from mllm_edge.models.interface import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.llava import CLIP_L_336, PROMPTS, Llava, LlavaDims
from mllm_edge.models.llava import CONFIGS as LLAVA_CONFIGS
from mllm_edge.models.llava import preprocessing as clip_preprocessing
from mllm_edge.models.parts import Part, filled

# In the order in which groundingLMM's train.py adds them behind the trained vocabulary.
ADDED = ("<im_start>", "<im_end>", "<bbox>", "<point>", "[SEG]", "<p>", "</p>")
SAM_MEAN = (123.675, 116.28, 103.53)  # on 0..255
SAM_STD = (58.395, 57.12, 57.375)
EXAMPLE_BOXES = np.array([[0.1, 0.2, 0.5, 0.7], [0.0, 0.0, 1.0, 1.0], [0.6, 0.55, 0.9, 0.8]], np.float32)


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


def shipped() -> Path:
    """The folder of the checkpoints that our recipes trained and that come with the package."""
    return Path(str(importlib.resources.files("mllm_edge"))) / "weights" / "glamm"


def build(checkpoint: Checkpoint) -> Glamm:
    """The PyTorch reference in fp32 with the checkpoint's weights, in eval mode."""
    model = Glamm(checkpoint.dims)
    model.load_state_dict({name: checkpoint.tensors[name].float() for name in tensor_shapes(checkpoint.dims)})
    return model.eval()


def preprocessing(dims: GlammDims) -> list[ImagePreprocessing]:
    """CLIP's centre crop, and SAM's: longest side to its size, padded with zeros (the mean) on the right and below."""
    return [
        clip_preprocessing(dims.llava),
        ImagePreprocessing(
            stage="mask_encoder",
            input="mask_pixel_values",
            size=dims.mask_encoder.image_size,
            fit="longest",
            resample="bilinear",
            pad_color=[0, 0, 0],
            mean=[value / 255 for value in SAM_MEAN],
            std=[value / 255 for value in SAM_STD],
        ),
    ]


def resolve(weights: str, config: str | None) -> Checkpoint:
    """Find the weights: shipped ones (""), `random`, a folder or a hub id in our layout or the published one.

    Raises:
        BadInput: unknown config, weights that cannot be found, or that are not GLaMM.
    """
    from mllm_edge.checkpoints.tensors import random_weights, resolve_folder
    from mllm_edge.models.glamm_layouts import load_glamm

    if config is not None and config not in CONFIGS:
        raise BadInput(f"glamm has no config {config!r}; it has {', '.join(CONFIGS)}")
    if weights == "random":
        name = config or SHIPPED[0]
        dims = CONFIGS[name]
        source = {"kind": "random", "config": name, "seed": "0"}
        return Checkpoint("glamm", name, dims, random_weights(tensor_shapes(dims)), shipped() / SHIPPED[0], source)
    if weights in ("", *SHIPPED):
        name = weights or config or SHIPPED[0]
        if name not in SHIPPED or config not in (None, name):
            raise BadInput(
                f"weights of {' and '.join(SHIPPED)} come with the package, none of {config or weights!r}; "
                "add --weights random or a path"
            )
        return load_glamm(shipped() / name)
    if config is not None:
        raise BadInput("--config goes with --weights random; a checkpoint brings its own config")
    return load_glamm(resolve_folder(weights))


def export_plan(checkpoint: Checkpoint) -> ExportPlan:
    """What export lowers: CLIP with its taps, connector, region encoder, SAM's encoder, and the mask decoder with the
    projection in front of it."""
    from mllm_edge.checkpoints.tokenizer import lead, read_tokenizer
    from mllm_edge.models.glamm_prompts import GROUNDED_QUESTION

    dims: GlammDims = checkpoint.dims
    llava, vision = dims.llava, dims.llava.vision
    assert isinstance(vision, VitDims)
    width, grid, channels = llava.language.width, dims.mask_decoder.grid, dims.mask_decoder.width
    side = dims.mask_encoder.image_size
    pixels = TensorSpec("pixel_values", "float32", [1, 3, vision.image_size, vision.image_size])
    features = TensorSpec("image_features", "float32", [1, vision.patches, vision.width])
    levels = TensorSpec("region_levels", "float32", [1, len(dims.taps), vision.patches, vision.width])
    boxes = TensorSpec("boxes", "float32", ["boxes", 4])
    mask_pixels = TensorSpec("mask_pixel_values", "float32", [1, 3, side, side])
    embedding = TensorSpec("image_embedding", "float32", [1, channels, grid, grid])
    states = TensorSpec("seg_states", "float32", ["masks", width])
    known = set(read_tokenizer(checkpoint.tokenizer).tokens)
    lacking = [token for token in ADDED if token not in known]
    if lacking:
        raise BadInput(f"{checkpoint.tokenizer} has no {lacking[0]}; give GLaMM's own tokenizer")

    def part(prefix: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        weights = Part(checkpoint.tensors, list(tensor_shapes(dims)), prefix)
        return lambda: filled(make(), weights)

    return ExportPlan(
        tasks=["chat", "grounded conversation", "referring segmentation", "region captioning"],
        stages=[
            StageExport(
                "vision_encoder",
                part("vision_encoder.", lambda: TappedEncoder(vision, dims.taps)),
                [pixels],
                [features, levels],
            ),
            StageExport(
                "connector",
                part("connector.", lambda: llava.projector()),
                [features],
                [TensorSpec("image_embeds", "float32", [1, llava.image_tokens, width])],
                precisions=("fp32", "fp16"),
            ),
            StageExport(
                "region_encoder",
                part("region_encoder.", lambda: RegionEncoder(vision.width, width, dims.region)),
                [levels, boxes],
                [TensorSpec("region_embeds", "float32", ["boxes", width])],
            ),
            StageExport(
                "mask_encoder",
                part("mask_encoder.", lambda: SamImageEncoder(dims.mask_encoder)),
                [mask_pixels],
                [embedding],
            ),
            StageExport(
                "mask_decoder",
                part("mask_head.", lambda: MaskHead(dims)),
                [embedding, states],
                [TensorSpec("mask_logits", "float32", ["masks", 4 * grid, 4 * grid])],
                precisions=("fp32",),  # small, and masks suffer in half precision (nanosam keeps its own so)
            ),
        ],
        language_model=LanguageModelExport(
            "llama",
            llava.language,
            Part(checkpoint.tensors, list(tensor_shapes(dims)), "language_model."),
            checkpoint.tokenizer,
            state_positions={"[SEG]": "before"},
        ),
        preprocessing=preprocessing(dims),
        prompt=replace(
            PROMPTS[llava.template],
            lead=lead(checkpoint.tokenizer),
            box="<bbox>",
            phrase=["<p>", "</p>"],
            added=list(ADDED),
        ),
        generation=Generation(),
        licences={"weights": checkpoint.source.get("licence", "see the checkpoint's own licence")},
        examples={"boxes": EXAMPLE_BOXES, "seg_states": example_states(width)},
        question=GROUNDED_QUESTION,
    )


def example_states(width: int) -> np.ndarray:
    """Three states as they come out of a final norm: float32 [3,width] of deviation 1."""
    return np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
