"""A system that exists only in tests: patches as features, a linear connector and a two-layer decoder."""

import dataclasses
import types
from pathlib import Path
from typing import ClassVar

import torch
from tiny_vit import FEATURES, PATCH, PATCHES, PIXELS, SIZE, WIDTH
from torch import nn

from mllm_edge import models
from mllm_edge.bundle.manifest import (
    EmbeddingTable,
    Generation,
    GgufDetails,
    LanguageModelEntry,
    Prompt,
    Slot,
    TensorSpec,
    Tokenizer,
)
from mllm_edge.bundle.read import file_entry
from mllm_edge.bundle.sources import Pixels
from mllm_edge.models.language.llama import LlamaDims, LlamaReference
from mllm_edge.models.plan import Checkpoint, ExportPlan, LanguageModelExport, StageExport

DIMS = LlamaDims(vocabulary=96, width=32, ffn_width=64, layers=2, heads=4, kv_heads=2, context=256)
SLOT = Slot("<image>", "pixels", ["image_embeds"], joint="<image>\n")
PROMPT = Prompt("toy", "", "USER: {text} ASSISTANT:", "USER: {text} ASSISTANT:", "{text}", [], [SLOT])
TOKENIZER = Tokenizer("language_model", "gguf", "language_model.gguf")
EMBEDS = TensorSpec("image_embeds", "float32", [1, PATCHES, DIMS.width])
HALF = [0.5, 0.5, 0.5]


def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=DIMS.vocabulary,
        hidden_size=DIMS.width,
        intermediate_size=DIMS.ffn_width,
        num_hidden_layers=DIMS.layers,
        num_attention_heads=DIMS.heads,
        num_key_value_heads=DIMS.kv_heads,
        initializer_range=0.3,  # logits that differ, so that greedy decoding has a clear winner
    )
    return LlamaForCausalLM(config).eval()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.patch(pixel_values).flatten(2).transpose(1, 2).softmax(-1)


class ToySystem(types.SimpleNamespace):
    """What a system's module offers. `built` counts how often each stage was built; `source` is the weights' name."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(built={"vision_encoder": 0, "connector": 0}, source="a", tokenizer=tmp_path, extras={})

    def _module(self, name):
        self.built[name] += 1
        torch.manual_seed(2)
        return Encoder() if name == "vision_encoder" else nn.Linear(WIDTH, DIMS.width)

    CONFIGS: ClassVar = {"small": DIMS}
    tensor_shapes = staticmethod(lambda _: {})
    SHIPPED: ClassVar = ("small",)

    def load(self, folder):
        source = {"kind": "path", "path": str(folder), "sha256": self.source}
        return Checkpoint("toy", "small", DIMS, {}, self.tokenizer, source)

    def plan(self, checkpoint):
        stages = [
            StageExport("vision_encoder", lambda: self._module("vision_encoder"), [PIXELS], [FEATURES]),
            StageExport("connector", lambda: self._module("connector"), [FEATURES], [EMBEDS], ("fp32", "fp16")),
        ]
        pixels = Pixels(PIXELS.name, SIZE, "pad", "bicubic", [127] * 3, HALF, HALF)
        lm = LanguageModelExport(DIMS, checkpoint.tokenizer, lambda: LlamaReference(decoder()))
        about = {"weights": "none"}
        return ExportPlan(["chat"], [pixels], stages, [TOKENIZER], lm, PROMPT, Generation(), about, extras=self.extras)


def register(monkeypatch, system):
    monkeypatch.setattr(models, "get", lambda name: types.SimpleNamespace(load_module=lambda: system))


def fake_gguf(lm, path, quant, *_, **__):
    """Stands in for the GGUF writer, which has its own tests."""
    path.write_bytes(b"GGUF" + quant.encode())
    details = GgufDetails(
        **dataclasses.asdict(file_entry(path.parent, path.name)),
        layers=DIMS.layers,
        kv_width=DIMS.kv_width,
        embedding=EmbeddingTable("F32", 0, [DIMS.vocabulary, DIMS.width]),
    )
    return LanguageModelEntry(
        name="language_model",
        engine="gguf",
        kind="causal",
        precision=quant,
        tokenizer="language_model",
        context=DIMS.context,
        width=DIMS.width,
        vocabulary=DIMS.vocabulary,
        kv_bytes_per_token=4 * DIMS.layers * DIMS.kv_width,
        gguf=details,
    )
