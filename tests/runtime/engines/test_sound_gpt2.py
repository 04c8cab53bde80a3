"""The gpt2 files of attackers: refused before llama.cpp ends the process, as those of test_sound.py."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_for_tests import causal, random_opt
from tokenizers_to_test import gpt2_lists

from mllm_edge.errors import BadInput
from mllm_edge.export.gguf.writer import export_language_model
from mllm_edge.models.language.opt import OptDims
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.llama import sound
from mllm_edge.runtime.engines.llama.gguf_file import read_head
from mllm_edge.runtime.engines.llama.model import LlamaLanguageModel

DIMS = OptDims(vocabulary=384, width=32, ffn_width=64, layers=1, heads=2, context=24)  # fewer than the child decodes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    lm = causal(DIMS, random_opt(DIMS).state_dict(), gpt2_lists(folder))
    export_language_model(lm, folder / "model.gguf", "f32")
    return folder / "model.gguf"


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.read_bytes())
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def change(path: Path, key: str, value: float, form: str = "<I") -> None:
    data = bytearray(path.read_bytes())
    at = data.index(text(key)) + len(text(key)) + 4  # after the type
    data[at : at + 4] = struct.pack(form, value)
    path.write_bytes(data)


def test_a_sound_file_with_few_positions(model: Path) -> None:
    assert read_head(model).shapes["position_embd.weight"] == (32, 24)
    sound.require_sound(model)


@pytest.mark.parametrize(
    ("key", "value", "form"),
    [
        ("gpt2.attention.layer_norm_epsilon", -1.0, "<f"),
        ("gpt2.attention.layer_norm_epsilon", float("nan"), "<f"),
        ("gpt2.attention.head_count", 0, "<I"),
        ("gpt2.attention.head_count", 3, "<I"),
        ("gpt2.block_count", 100_000, "<I"),
        ("gpt2.context_length", 0, "<I"),
        ("gpt2.embedding_length", 0, "<I"),
        ("gpt2.vocab_size", 10_000, "<I"),
    ],
)
def test_numbers_that_cannot_be(model: Path, key: str, value: float, form: str) -> None:
    change(model, key, value, form)
    with pytest.raises(BadInput, match=key.replace(".", r"\.") + "|heads"):
        read_head(model)


def test_an_architecture_that_is_no_text(tmp_path: Path) -> None:
    names = struct.pack("<IIQ", 9, 8, 1) + text("gpt2")  # an array of one string
    (tmp_path / "list.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("general.architecture") + names)
    with pytest.raises(BadInput, match="architecture is"):
        read_head(tmp_path / "list.gguf")


@pytest.mark.parametrize(
    "more",
    [{"attention.head_count_kv": 1}, {"attention.key_length": 8, "attention.value_length": 8}, {"expert_count": 2}],
    ids=str,
)
def test_heads_are_views_of_one_matrix(tmp_path: Path, whole: Path, more: dict[str, int]) -> None:
    reader, path = gguf.GGUFReader(whole), tmp_path / "more.gguf"
    writer = gguf.GGUFWriter(path, "gpt2")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            value, kind = field.contents(), field.types[0]
            writer.add_key_value(name, value, kind, field.types[-1] if len(field.types) > 1 else None)
    for key, value in more.items():
        writer.add_uint32(f"gpt2.{key}", value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadInput, match=r"heads|experts"):
        read_head(path)


@pytest.mark.parametrize(
    ("key", "value"), [("gpt2.context_length", 4096), ("gpt2.context_length", 8), ("gpt2.feed_forward_length", 128)]
)
def test_numbers_that_the_tensors_belie_are_llama_cpps_error(model: Path, key: str, value: int) -> None:
    lm = causal(DIMS, random_opt(DIMS).state_dict(), model.parent)
    gpt2_lists(model.parent)
    entry = export_language_model(lm, model, "f32")
    change(model, key, value)
    with pytest.raises(BadInput, match="cannot load it"):
        LlamaLanguageModel(model.parent, entry, Options("cpu", True, 1, "f32", 24))
