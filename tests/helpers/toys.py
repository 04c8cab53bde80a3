"""What the toy systems of tests/seams share: how they stand in the list of systems, and a tokenizer of letters."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mllm_edge import models
from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.bundle.sources import Pixels
from mllm_edge.models.plan import Checkpoint, ExportPlan

SIZE, PATCH = 16, 8
PATCHES = (SIZE // PATCH) ** 2
PIXELS = Pixels("toy_pixels", SIZE, "squash", "bilinear", [0, 0, 0], [0.5] * 3, [0.5] * 3)
PIXEL_SPEC = TensorSpec("toy_pixels", "float32", [1, 3, SIZE, SIZE])


def register(monkeypatch: pytest.MonkeyPatch, dims: Any, plan: Callable[[Checkpoint], ExportPlan]) -> None:
    """Have `models.get` know a system "toy": its weights are the plan's own, its checkpoint a tokenizer's folder."""
    module = types.SimpleNamespace(
        CONFIGS={"tiny": dims},
        SHIPPED=("tiny",),
        tensor_shapes=lambda _: {},
        load=lambda folder: Checkpoint("toy", "tiny", dims, {}, folder, {"kind": "checkpoint", "path": str(folder)}),
        plan=plan,
    )
    monkeypatch.setattr(models, "get", lambda name: types.SimpleNamespace(name=name, load_module=lambda: module))


def seeded(make: Callable[[], nn.Module], seed: int) -> Callable[[], nn.Module]:
    """What builds a module with the same random weights each time."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return make().eval()

    return build


def letters(folder: Path, words: Mapping[str, int] | None = None) -> Path:
    """A folder with a `tokenizer.json`: one token a letter, `<pad>` 0, `</s>` 1, and control tokens `words`."""
    alphabet = [" ", *"abcdefghijklmnopqrstuvwxyz.,:?"]
    pieces = ["<pad>", "</s>", *alphabet, *(words or {})]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    added = [
        {"id": vocabulary[text], "content": text, "special": True, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for text in ("<pad>", "</s>", *(words or {}))
    ]
    data = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


class Patches(nn.Module):
    """Patches of a picture as rows of `width`: [1,3,S,S] -> [1,N,width]."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, toy_pixels: torch.Tensor) -> torch.Tensor:
        return self.patch(toy_pixels).flatten(2).transpose(1, 2)  # [1,N,width]


def noise_picture(seed: int) -> np.ndarray:
    """uint8 [24,24,3]."""
    return np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
