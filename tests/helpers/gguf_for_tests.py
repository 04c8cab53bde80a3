"""GGUF files for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.export.gguf.maps import tensor_shapes
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.language.opt import OptDims, opt
from mllm_edge.models.plan import LanguageModelExport


def causal(dims: LlamaDims | OptDims, tensors: Mapping[str, torch.Tensor], tokenizer: Path) -> LanguageModelExport:
    """A language model that is only written: nothing may ask for its reference."""

    def reference() -> NoReturn:
        raise AssertionError("the reference was built")

    architecture = "opt" if isinstance(dims, OptDims) else "llama"
    return LanguageModelExport(dims, tokenizer, reference, architecture=architecture, tensors=tensors)


def random_opt(dims: OptDims, seed: int = 1) -> torch.nn.Module:
    """Weights of a size that moves answers; large ones of positions keep a tied head from repeating a token."""
    torch.manual_seed(seed)
    model = opt(dims).eval()
    for name, parameter in model.named_parameters():
        norm = "layer_norm.weight" in name
        spread = 0.3 if norm or "positions" in name else 0.08
        torch.nn.init.normal_(parameter, 1.0 if norm else 0.0, spread)
    return model


def vocabulary_only(tmp_path: Path, folder: Path) -> Path:
    size = len(read_tokenizer(folder).tokens)
    dims = LlamaDims(vocabulary=size + 3, width=32, ffn_width=32, layers=1, heads=1, kv_heads=1, context=32)
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(dims).items()}
    path = tmp_path / "vocabulary.gguf"
    export_language_model(causal(dims, state, folder), path, "f32")
    return path
