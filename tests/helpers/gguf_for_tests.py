"""GGUF files for tests."""

from pathlib import Path

import torch

from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.export.gguf.writer import export_language_model, tensor_shapes
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.plan import LanguageModelExport


def vocabulary_only(tmp_path: Path, folder: Path) -> Path:
    size = len(read_tokenizer(folder).tokens)
    dims = LlamaDims(vocabulary=size + 3, width=32, ffn_width=32, layers=1, heads=1, kv_heads=1, context=32)
    state = {name: torch.zeros(shape) for name, shape in tensor_shapes(dims).items()}
    path = tmp_path / "vocabulary.gguf"
    export_language_model(LanguageModelExport("llama", dims, state, folder), path, "f32")
    return path
