"""What export lowers of a GLaMM, and what its bundles say of prompts and answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from mllm_edge.bundle.answers import MasksAnswer
from mllm_edge.bundle.manifest import Generation, TensorSpec, Tokenizer
from mllm_edge.bundle.sources import Boxes, Pixels, States
from mllm_edge.checkpoints.tokenizer import lead, require_tokens
from mllm_edge.models.blocks.region import RegionEncoder
from mllm_edge.models.blocks.sam import SamImageEncoder
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.glamm.layouts import load as load
from mllm_edge.models.glamm.model import ADDED, GlammDims, MaskHead, TappedEncoder
from mllm_edge.models.glamm.model import CONFIGS as CONFIGS
from mllm_edge.models.glamm.model import SHIPPED as SHIPPED
from mllm_edge.models.glamm.model import build as build
from mllm_edge.models.glamm.model import tensor_shapes as tensor_shapes
from mllm_edge.models.glamm.prompts import GROUNDED_QUESTION, PHRASE, PHRASE_END, PROMPT, SEG
from mllm_edge.models.llava.plan import language_model
from mllm_edge.models.llava.plan import preprocessing as clip_preprocessing
from mllm_edge.models.parts import Part, filled
from mllm_edge.models.plan import Checkpoint, ExportPlan, StageExport

PROMPTS = {PROMPT.name: PROMPT}
SAM_MEAN = (123.675, 116.28, 103.53)  # on 0..255
SAM_STD = (58.395, 57.12, 57.375)
EXAMPLE_BOXES = np.array([[0.1, 0.2, 0.5, 0.7], [0.0, 0.0, 1.0, 1.0], [0.6, 0.55, 0.9, 0.8]], np.float32)


def preprocessing(dims: GlammDims) -> list[Pixels]:
    """CLIP's centre crop, and SAM's: longest side to its size, padded with zeros (the mean) on the right and below."""
    return [
        clip_preprocessing(dims.llava),
        Pixels(
            "mask_pixel_values",
            size=dims.mask_encoder.image_size,
            fit="longest",
            resample="bilinear",
            pad_color=[0, 0, 0],
            mean=[value / 255 for value in SAM_MEAN],
            std=[value / 255 for value in SAM_STD],
        ),
    ]


def plan(checkpoint: Checkpoint) -> ExportPlan:
    """What export lowers: CLIP with its taps, connector, region encoder, SAM's encoder, and the mask decoder with the
    projection in front of it."""
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
    require_tokens(checkpoint.tokenizer, ADDED)

    def part(prefix: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        weights = Part(checkpoint.tensors, list(tensor_shapes(dims)), prefix)
        return lambda: filled(make(), weights)

    return ExportPlan(
        tasks=["chat", "grounded conversation", "referring segmentation", "region captioning"],
        sources=[*preprocessing(dims), Boxes("boxes"), States("seg_states", [SEG], at="before")],
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
        tokenizers=[
            Tokenizer("language_model", "gguf", "language_model.gguf", lead(checkpoint.tokenizer), added=list(ADDED))
        ],
        language_model=language_model(checkpoint, llava.language, list(tensor_shapes(dims))),
        prompt=PROMPT,
        answers=[MasksAnswer("seg_states", "mask_logits", side, [PHRASE, PHRASE_END])],
        generation=Generation(),
        licences={"weights": checkpoint.source.get("licence", "see the checkpoint's own licence")},
        examples={"boxes": EXAMPLE_BOXES, "seg_states": example_states(width)},
        question=GROUNDED_QUESTION,
    )


def example_states(width: int) -> np.ndarray:
    """Three states as they come out of a final norm: float32 [3,width] of deviation 1."""
    return np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
