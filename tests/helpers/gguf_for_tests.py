"""GGUF files for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch

from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.export.gguf.maps import tensor_shapes
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.plan import LanguageModelExport


def causal(dims: LlamaDims, tensors: Mapping[str, torch.Tensor], tokenizer: Path) -> LanguageModelExport:
    """A language model that is only written: nothing may ask for its reference."""

    def reference() -> NoReturn:
        raise AssertionError("the reference was built")

    return LanguageModelExport(dims, tokenizer, reference, tensors=tensors)


def vocabulary_only(tmp_path: Path, folder: Path) -> Path:
    size = len(read_tokenizer(folder).tokens)
    dims = LlamaDims(vocabulary=size + 3, width=32, ffn_width=32, layers=1, heads=1, kv_heads=1, context=32)
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(dims).items()}
    path = tmp_path / "vocabulary.gguf"
    export_language_model(causal(dims, state, folder), path, "f32")
    return path
