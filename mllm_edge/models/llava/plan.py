"""The export plan of a LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mllm_edge.bundle.manifest import Generation, TensorSpec, Tokenizer
from mllm_edge.bundle.sources import Pixels
from mllm_edge.checkpoints.tokenizer import fitting_tokenizer, lead, require_tokens
from mllm_edge.models.blocks.encoders import float32_modules, vision_encoder
from mllm_edge.models.language.llama import LlamaDims, LlamaReference, llama
from mllm_edge.models.language.llama_parts import parts
from mllm_edge.models.llava.conversation import marked
from mllm_edge.models.llava.layouts import load as load
from mllm_edge.models.llava.model import CONFIGS as CONFIGS
from mllm_edge.models.llava.model import SHIPPED as SHIPPED
from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.llava.model import build as build
from mllm_edge.models.llava.model import tensor_shapes as tensor_shapes
from mllm_edge.models.llava.prompts import EMBEDS, MARKS
from mllm_edge.models.llava.prompts import PROMPTS as PROMPTS
from mllm_edge.models.parts import Decoder, Part, filled
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport

if TYPE_CHECKING:
    from torch import nn


def plan(checkpoint: Checkpoint) -> ExportPlan:
    """The export plan: vision encoder and connector as stages, the decoder as the language model."""
    dims: LlavaDims = checkpoint.dims
    names = list(tensor_shapes(dims))
    vision = Part(checkpoint.tensors, names, "vision_encoder.")
    bridge = Part(checkpoint.tensors, names, "connector.")
    size, patches = dims.vision.image_size, dims.vision.patches
    pixels = TensorSpec("pixel_values", "float32", [1, 3, size, size])
    features = TensorSpec("image_features", "float32", [1, patches, dims.vision.width])
    embeds = TensorSpec(EMBEDS, "float32", [1, dims.image_tokens, dims.language.width])
    prompt, prompt_from = checkpoint.prompt() if checkpoint.prompt else (PROMPTS[dims.template], "")
    if dims.marked:
        prompt = marked(prompt)
        require_tokens(checkpoint.tokenizer, MARKS)
    added = list(MARKS) if dims.marked else []
    return ExportPlan(
        tasks=["chat"],
        sources=[preprocessing(dims)],
        stages=[
            StageExport(
                "vision_encoder",
                lambda: filled(vision_encoder(dims.vision), vision),
                [pixels],
                [features],
                float32=float32_modules(dims.vision),
                reference=checkpoint.references.get("vision_encoder"),
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
                reference=checkpoint.references.get("connector"),
            ),
        ],
        tokenizers=[
            Tokenizer("language_model", "gguf", "language_model.gguf", lead(checkpoint.tokenizer), added=added)
        ],
        language_model=language_model(checkpoint, dims.language, names),
        prompt=prompt,
        generation=Generation(),
        licences={"weights": checkpoint.source.get("licence", "see the checkpoint's own licence")},
        prompt_from=prompt_from,
        extras={"mmproj": lambda path: _write_mmproj(checkpoint, path)},
    )


def language_model(checkpoint: Checkpoint, dims: LlamaDims, names: list[str]) -> LanguageModelExport:
    """The decoder of a checkpoint whose tensors have `names`. Raises BadInput where its tokenizer does not fit."""
    fitting_tokenizer(checkpoint.tokenizer, dims.vocabulary)
    tensors = Part(checkpoint.tensors, names, "language_model.")
    library = checkpoint.references.get("language_model")

    def model() -> nn.Module:
        return library() if library else filled(llama(dims), Decoder(tensors))

    return LanguageModelExport(
        dims,
        checkpoint.tokenizer,
        lambda: LlamaReference(model()),
        tensors=tensors,
        parts=parts(dims, model),
    )


def preprocessing(dims: LlavaDims) -> Pixels:
    """CLIP's preprocessing; the padding colour is int(255 * mean), truncated as in LLaVA's `expand2square`."""
    return Pixels(
        "pixel_values",
        size=dims.vision.image_size,
        fit=dims.fit,
        resample=dims.resample,
        pad_color=[int(255 * value) for value in dims.mean],
        mean=list(dims.mean),
        std=list(dims.std),
    )


def _write_mmproj(checkpoint: Checkpoint, path: Path) -> None:
    from mllm_edge.models.llava.mmproj import write_mmproj  # only export has the gguf package

    write_mmproj(checkpoint.tensors, checkpoint.dims, path)
