"""LLaVA: CLIP -> connector -> splice into a LLaMA decoder (Liu et al. 2023, arXiv 2304.08485 and 2310.03744)."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllm_edge.bundle import Generation, ImagePreprocessing, Prompt, TensorSpec
from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.connectors import connector
from mllm_edge.models.blocks.encoders import EncoderDims, float32_modules, vision_encoder
from mllm_edge.models.blocks.mobilenet import MobileNetDims
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.interface import Checkpoint, ExportPlan, LanguageModelExport, StageExport
from mllm_edge.models.language.llama import LlamaDims, llama
from mllm_edge.models.parts import Part, filled

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGE_INDEX = -200  # stands in the ids where a picture's embeddings go (llava/constants.py)


@dataclass(frozen=True)
class LlavaDims:
    """The whole system's shape.

    `merge` is the side of the square of neighbouring features whose embeddings become one, their mean; `fit` is how a
    picture becomes square; `template` names an entry of `PROMPTS`.
    """

    vision: EncoderDims
    language: LlamaDims
    connector: str = "mlp2x_gelu"
    merge: int = 1
    fit: str = "pad"
    template: str = "vicuna_v1"
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD

    @property
    def image_tokens(self) -> int:
        """Places that a picture takes in the prompt."""
        return self.vision.patches // self.merge**2

    def projector(self) -> nn.Sequential:
        """The connector between encoder and decoder, freshly initialized."""
        return connector(self.connector, self.vision.width, self.language.width, self.vision.patches, self.merge)


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

SHIPPED = ("tiny", "smol")  # configs whose weights come with the package, the default first

_ASSISTANT = "gives helpful, detailed, and polite answers to the {0}'s questions."
_SYSTEM = "A chat between a curious {0} and an artificial intelligence assistant. The assistant " + _ASSISTANT
_SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_CHATML = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)


def _prompt(name: str, system: str, first: str, following: str, answer: str, stop: list[str]) -> Prompt:
    return Prompt(name, system, first, following, answer, "<image>", "<image>\n", lead="", stop=stop)


# llava/conversation.py. `first` opens the dialogue, `following` later turns, `answer` closes the assistant's turn.
_TURN = "USER: {text} ASSISTANT:"
PROMPTS: dict[str, Prompt] = {
    prompt.name: prompt
    for prompt in (
        _prompt("vicuna_v1", _SYSTEM.format("user"), "{system} " + _TURN, _TURN, " {text}</s>", ["</s>"]),
        _prompt("llava_v1", _SYSTEM.format("human"), "{system} " + _TURN, _TURN, " {text}</s>", ["</s>"]),
        _prompt("vicuna_v1_no_system", "", _TURN, " " + _TURN, " {text}</s>", ["</s>"]),
        _prompt(
            "llava_v0",
            _SYSTEM.format("human"),
            "{system}###Human: {text}###Assistant:",
            "Human: {text}###Assistant:",
            " {text}###",
            ["###"],
        ),
        _prompt(
            "llava_llama_2",
            _LLAMA_2,
            "[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{text} [/INST]",
            "[INST] {text} [/INST]",
            " {text} </s>",
            ["</s>"],
        ),
        _prompt(
            "chatml_smollm",
            _SMOLLM,
            "<|im_start|>system\n{system}<|im_end|>\n" + _CHATML,
            "\n" + _CHATML,
            "{text}<|im_end|>",
            ["<|im_end|>"],
        ),
        Prompt(
            "glamm",  # llava_v1 with the picture's place marked and introduced (groundingLMM app.py)
            _SYSTEM.format("human"),
            "{system} " + _TURN,
            _TURN,
            " {text}</s>",
            "<image>",
            "The <image> provides an overview of the picture.\n",
            lead="",
            stop=["</s>"],
            image_open="<im_start>",
            image_close="<im_end>",
        ),
        _prompt("plain", "", "{text}", "{text}", "{text}\n", ["\n"]),
    )
}


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
            ids: int64 [B,T]; a picture takes N places holding IMAGE_INDEX (the form of transformers' port).
            image_embeds: [P,N,D] for the P pictures of the batch, in reading order.

        Returns:
            [B,T,D].
        """
        here = ids == IMAGE_INDEX
        embeds: Tensor = self.language_model.get_input_embeddings()(ids.masked_fill(here, 0))
        return embeds.masked_scatter(here.unsqueeze(-1), image_embeds.to(embeds.dtype))

    def forward(self, ids: Tensor, mask: Tensor, pixel_values: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits [B,T,V] of spliced sequences.

        Args:
            ids: int64 [B,T], see `splice`.
            mask: int64 [B,T], 0 on padding, or float32 [B,1,T,T] to add to the attention scores.
            pixel_values: float32 [P,3,S,S].
            positions: int64 [B,T], where they are not simply 0, 1, 2, ...
        """
        embeds = self.splice(ids, self.encode(pixel_values))
        logits: Tensor = self.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
        return logits


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


def resolve(weights: str, config: str | None) -> Checkpoint:
    """Find the weights: shipped ones by their name ("": the config's), `random`, a folder or a hub id in any known
    layout.

    Raises:
        BadInput: unknown config, weights that cannot be found, or that are not LLaVA.
    """
    from mllm_edge.checkpoints.tensors import random_weights, resolve_folder
    from mllm_edge.models.llava_layouts import load_llava

    if config is not None and config not in CONFIGS:
        raise BadInput(f"llava has no config {config!r}; it has {', '.join(CONFIGS)}")
    if weights == "random":
        name = config or "tiny"
        dims = CONFIGS[name]
        source = {"kind": "random", "config": name, "seed": "0"}
        return Checkpoint("llava", name, dims, random_weights(tensor_shapes(dims)), shipped() / "tiny", source)
    if weights in ("", *SHIPPED):
        name = weights or config or SHIPPED[0]
        if name not in SHIPPED or config not in (None, name):
            raise BadInput(
                f"weights of {' and '.join(SHIPPED)} come with the package, none of {config or weights!r}; "
                "add --weights random or a path"
            )
        return load_llava(shipped() / name)
    if config is not None:
        raise BadInput("--config goes with --weights random; a checkpoint brings its own config")
    return load_llava(resolve_folder(weights))


def shipped() -> Path:
    """The folder of the checkpoints that our recipes trained and that come with the package."""
    return Path(str(importlib.resources.files("mllm_edge"))) / "weights" / "llava"


def build(checkpoint: Checkpoint) -> Llava:
    """The PyTorch reference in fp32 with the checkpoint's weights, in eval mode."""
    model = Llava(checkpoint.dims)
    names = tensor_shapes(checkpoint.dims)
    state = {name: checkpoint.tensors[name].float() for name in names}
    if checkpoint.dims.language.tied:
        state["language_model.lm_head.weight"] = state["language_model.model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def export_plan(checkpoint: Checkpoint) -> ExportPlan:
    """What export lowers: vision encoder and connector as stages, the decoder as the language model."""
    from mllm_edge.checkpoints.tokenizer import lead

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


def write_mmproj(checkpoint: Checkpoint, path: Path) -> None:
    """Write llama.cpp's multimodal projector file, so that its own tools run the same model."""
    from mllm_edge.export.mmproj import write_mmproj as write

    write(checkpoint.tensors, checkpoint.dims, path)
