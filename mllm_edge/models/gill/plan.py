"""What export lowers of a GILL, and what its bundles say of prompts and answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from mllm_edge.bundle.answers import PicturesAnswer, RetrievedAnswer
from mllm_edge.bundle.manifest import Prompt, TensorSpec, Tokenizer
from mllm_edge.bundle.sources import Pixels, States
from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks import unet
from mllm_edge.models.blocks.unet import UNet
from mllm_edge.models.blocks.vae import VaeDecoder
from mllm_edge.models.gill.heads import HeadsOfTokens
from mllm_edge.models.gill.layouts import load as load
from mllm_edge.models.gill.model import CONFIGS as CONFIGS
from mllm_edge.models.gill.model import LM, TOKENS, Connector, GillDims, PooledEncoder
from mllm_edge.models.gill.model import SHIPPED as SHIPPED
from mllm_edge.models.gill.model import build as build
from mllm_edge.models.gill.model import tensor_shapes as tensor_shapes
from mllm_edge.models.gill.prompts import GENERATION, PROMPT, QUESTION
from mllm_edge.models.language.llama import LlamaReference
from mllm_edge.models.language.opt import TABLE, opt
from mllm_edge.models.llava.model import IMAGE_MEAN, IMAGE_STD
from mllm_edge.models.parts import Decoder, Part, filled
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.models.text_to_image import BETAS, TRAIN_STEPS

PROMPTS: dict[str, Prompt] = {}  # a GILL has one
GUIDANCE, STEPS = 7.5, 50
STATES = "image_states"
Filled = Callable[[str, Callable[[], nn.Module]], Callable[[], nn.Module]]


def preprocessing(dims: GillDims) -> Pixels:
    """CLIP's: the shortest edge to its size, then the centre."""
    return Pixels(
        "pixel_values",
        dims.vision.image_size,
        "crop",
        "bicubic",
        [0, 0, 0],
        mean=list(IMAGE_MEAN),
        std=list(IMAGE_STD),
    )


def plan(checkpoint: Checkpoint) -> ExportPlan:
    """What export lowers: CLIP, connector, heads, UNet, the decoder of the autoencoder, and the OPT as a GGUF file.

    Raises:
        BadInput: the tokenizer's last tokens are not the picture tokens.
    """
    dims: GillDims = checkpoint.dims
    tokens = read_tokenizer(checkpoint.tokenizer).tokens
    # Random weights go with the small tokenizer that ships, whose picture tokens lie before rows that it does not use.
    start = len(tokens) - len(TOKENS) if checkpoint.source["kind"] == "random" else dims.start
    if tuple(tokens[start:]) != TOKENS:
        raise BadInput(
            f"{checkpoint.tokenizer} has {tokens[start:][:9]} from {start} on, not {TOKENS[0]} to "
            f"{TOKENS[-1]}; give the model's own tokenizer"
        )
    names = list(tensor_shapes(dims))

    def part(prefix: str, make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        weights = Part(checkpoint.tensors, names, prefix)
        return lambda: filled(make(), weights)

    decoder = Part(checkpoint.tensors, names, LM)
    random = np.random.default_rng(0)
    latent = random.standard_normal([1, dims.unet.channels, dims.unet.side, dims.unet.side], np.float32)
    scale = checkpoint.tensors["logit_scale"]
    return ExportPlan(
        tasks=["captioning", "dialogue", "picture retrieval", "picture generation"],
        sources=[preprocessing(dims), States(STATES, list(TOKENS), at="token")],
        stages=_stages(checkpoint, part, start),
        tokenizers=[Tokenizer("language_model", "gguf", "language_model.gguf", added=list(TOKENS))],
        language_model=LanguageModelExport(
            dims.language,
            checkpoint.tokenizer,
            lambda: LlamaReference(filled(opt(dims.language), Decoder(decoder, TABLE))),
            architecture="opt",
            tensors=decoder,
        ),
        prompt=PROMPT,
        answers=[
            RetrievedAnswer(
                STATES,
                "query",
                1.0 if scale.is_meta else float(scale.float().exp()),  # shapes alone have no numbers
                decision="decision" if dims.decides else "",
                picture="image_query",
                needed=False,
            ),
            PicturesAnswer(
                STATES,
                unet="unet",
                vae="vae_decoder",
                latent="latent",
                timestep="timestep",
                noise="noise",
                decoded="decoded",
                pixels="pixels",
                latent_scale=dims.vae.scale,
                shape=list(latent.shape),
                betas=list(BETAS),
                train_steps=TRAIN_STEPS,
                drops=[["text", "empty_text"]],
                guidance=[GUIDANCE],
                schedule="pndm",
                steps=STEPS,
                decision="decision" if dims.decides else "",
            ),
        ],
        generation=GENERATION,
        licences={"weights": checkpoint.source.get("licence", "see the checkpoint's own licence")},
        constants={"empty_text": lambda: checkpoint.tensors["empty_text"].float().numpy()},
        examples={
            STATES: random.standard_normal((len(TOKENS), dims.language.width), np.float32),
            "latent": latent,
            "decoded": latent,
            "timestep": np.array([401.0], np.float32),
        },
        question=QUESTION,
    )


def _stages(checkpoint: Checkpoint, part: Filled, start: int) -> list[StageExport]:
    dims: GillDims = checkpoint.dims
    side, width, text_rows = dims.vision.image_size, dims.language.width, dims.mapper.queries
    pooled = TensorSpec("pooled", "float32", ["pictures", dims.vision.width])
    text = TensorSpec("text", "float32", [1, text_rows, dims.mapper.out_width])
    cells, large = dims.unet.side, dims.unet.side * dims.vae.shrinks
    found = [text, TensorSpec("query", "float32", [1, dims.query_width])]
    if dims.decides:
        found.append(TensorSpec("decision", "float32", [1, 2]))
    heads = part("heads.", dims.heads)
    return [
        StageExport(
            "vision_encoder",
            part("vision_encoder.", lambda: PooledEncoder(dims.vision)),
            [TensorSpec("pixel_values", "float32", ["pictures", 3, side, side])],
            [pooled],
        ),
        StageExport(
            "connector",
            part("connector.", lambda: Connector(dims)),
            [pooled],
            [
                TensorSpec("image_embeds", "float32", ["pictures", dims.rows, width]),
                TensorSpec("image_query", "float32", ["pictures", dims.query_width]),
            ],
            precisions=("fp32", "fp16"),
        ),
        StageExport(
            "heads",
            lambda: HeadsOfTokens(heads(), checkpoint.tensors[f"{LM}{TABLE}"][start : start + len(TOKENS)].float()),
            [TensorSpec(STATES, "float32", [len(TOKENS), width])],
            found,
            precisions=("fp32", "fp16"),
        ),
        StageExport(
            "unet",
            part("unet.", lambda: UNet(dims.unet)),
            [
                TensorSpec("latent", "float32", ["branches", dims.unet.channels, cells, cells]),
                TensorSpec("timestep", "float32", [1]),
                TensorSpec("text", "float32", ["branches", *text.shape[1:]]),
            ],
            [TensorSpec("noise", "float32", ["branches", dims.unet.out_channels, cells, cells])],
            float32=unet.FLOAT32,
        ),
        StageExport(
            "vae_decoder",
            part("vae_decoder.", lambda: VaeDecoder(dims.vae)),
            [TensorSpec("decoded", "float32", [1, dims.vae.latent_channels, cells, cells])],
            [TensorSpec("pixels", "float32", [1, dims.vae.channels, large, large])],
        ),
    ]
