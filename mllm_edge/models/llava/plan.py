"""What export lowers of a LLaVA."""

from __future__ import annotations

from pathlib import Path

from mllm_edge.bundle.manifest import Generation, ImagePreprocessing, Prompt, TensorSpec
from mllm_edge.checkpoints.tokenizer import lead
from mllm_edge.models.blocks.encoders import float32_modules, vision_encoder
from mllm_edge.models.llava.layouts import load as load
from mllm_edge.models.llava.model import CONFIGS as CONFIGS
from mllm_edge.models.llava.model import SHIPPED as SHIPPED
from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.llava.model import build as build
from mllm_edge.models.llava.model import tensor_shapes as tensor_shapes
from mllm_edge.models.llava.prompts import PROMPTS
from mllm_edge.models.parts import Part, filled
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport


def plan(checkpoint: Checkpoint) -> ExportPlan:
    """What export lowers: vision encoder and connector as stages, the decoder as the language model."""
    dims: LlavaDims = checkpoint.dims
    names = list(tensor_shapes(dims))
    vision = Part(checkpoint.tensors, names, "vision_encoder.")
    bridge = Part(checkpoint.tensors, names, "connector.")
    size, patches = dims.vision.image_size, dims.vision.patches
    pixels = TensorSpec("pixel_values", "float32", [1, 3, size, size])
    features = TensorSpec("image_features", "float32", [1, patches, dims.vision.width])
    embeds = TensorSpec("image_embeds", "float32", [1, dims.image_tokens, dims.language.width])
    prompt = PROMPTS[dims.template]
    return ExportPlan(
        tasks=["chat"],
        stages=[
            StageExport(
                "vision_encoder",
                lambda: filled(vision_encoder(dims.vision), vision),
                [pixels],
                [features],
                float32=float32_modules(dims.vision),
            ),
            StageExport(
                "connector",
                lambda: filled(
                    dims.projector(),
                    bridge,
                ),
                [features],
                [embeds],
                precisions=("fp32", "fp16"),
            ),
        ],
        language_model=LanguageModelExport(
            "llama",
            dims.language,
            Part(checkpoint.tensors, names, "language_model."),
            checkpoint.tokenizer,
        ),
        preprocessing=[preprocessing(dims)],
        prompt=Prompt(**{**vars(prompt), "lead": lead(checkpoint.tokenizer)}),
        generation=Generation(),
        licences={"weights": checkpoint.source.get("licence", "see the checkpoint's own licence")},
        extras={"mmproj": lambda path: _write_mmproj(checkpoint, path)},
    )


def preprocessing(dims: LlavaDims) -> ImagePreprocessing:
    """CLIP's preprocessing; the padding colour is int(255 * mean), truncated as LLaVA's `expand2square` has it."""
    return ImagePreprocessing(
        stage="vision_encoder",
        input="pixel_values",
        size=dims.vision.image_size,
        fit=dims.fit,
        resample="bicubic",
        pad_color=[int(255 * value) for value in dims.mean],
        mean=list(dims.mean),
        std=list(dims.std),
    )


def _write_mmproj(checkpoint: Checkpoint, path: Path) -> None:
    from mllm_edge.models.llava.mmproj import write_mmproj  # only export has the gguf package

    write_mmproj(checkpoint.tensors, checkpoint.dims, path)
