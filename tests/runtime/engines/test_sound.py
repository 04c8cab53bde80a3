"""GGUF files of attackers: refused before llama.cpp ends the process, by reading or by a child that dies instead."""

from __future__ import annotations

import signal
import struct
import sys
from pathlib import Path

import pytest

from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.llama import probe, sound
from mllm_edge.runtime.engines.llama.gguf_file import read_head
from mllm_edge.runtime.engines.llama.tokenizer import GgufTokenizer


@pytest.fixture
def model(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.gguf"
    path.write_bytes((tiny_bundle / "language_model.gguf").read_bytes())
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def change(path: Path, key: str, form: str, value: float) -> None:
    """Another number at a key (after which its type stands, in four bytes)."""
    data = bytearray(path.read_bytes())
    at = data.index(text(key)) + len(text(key)) + 4
    data[at : at + struct.calcsize(form)] = struct.pack(form, value)
    path.write_bytes(data)


def test_a_sound_file(model: Path) -> None:
    head = read_head(model)
    assert head.values["general.architecture"] == "llama" and "token_embd.weight" in head.shapes
    sound.require_sound(model)


@pytest.mark.parametrize(
    ("key", "form", "value"),
    [
        ("llama.attention.layer_norm_rms_epsilon", "<f", -1.0),
        ("llama.attention.layer_norm_rms_epsilon", "<f", float("nan")),
        ("llama.attention.head_count", "<I", 0),
        ("llama.attention.head_count", "<I", 3),
        ("llama.attention.head_count_kv", "<I", 0),
        ("llama.block_count", "<I", 100_000_000),
        ("llama.rope.dimension_count", "<I", 0),
        ("llama.embedding_length", "<I", 0),
        ("tokenizer.ggml.bos_token_id", "<I", 1_000_000),
    ],
)
def test_numbers_that_cannot_be(model: Path, key: str, form: str, value: float) -> None:
    change(model, key, form, value)
    with pytest.raises(BadInput, match=key.replace(".", r"\.") + "|heads"):
        read_head(model)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"GGUF", b"GGUX", "no GGUF of version"),
        (text("llama"), text("mamba"), "architecture"),
        (text("token_embd.weight"), text("token_embd.weighs"), None),  # which llama.cpp itself misses
    ],
)
def test_texts(model: Path, old: bytes, new: bytes, message: str | None) -> None:
    data = model.read_bytes()
    assert len(old) == len(new)
    model.write_bytes(data.replace(old, new, 1))
    if message is None:
        read_head(model)
        return
    with pytest.raises(BadInput, match=message):
        read_head(model)


def test_a_token_that_is_there_twice(model: Path) -> None:
    data = model.read_bytes()
    model.write_bytes(data.replace(text("<0x41>"), text("<0x42>"), 1))
    with pytest.raises(BadInput, match=r"is the text '<0x42>', as is token"):
        GgufTokenizer(model)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.05, 0.5, 0.99])
def test_files_that_end_too_early(model: Path, share: float) -> None:
    data = model.read_bytes()
    model.write_bytes(data[: int(share * len(data))])
    with pytest.raises(BadInput, match="no GGUF that can be run"):
        read_head(model)


def child(monkeypatch: pytest.MonkeyPatch, code: str) -> list[int]:
    """The trying child does this; counts its runs."""
    runs: list[int] = []

    def command(path: Path) -> list[str]:
        runs.append(1)
        return [sys.executable, "-c", code]

    monkeypatch.setattr(probe, "plain_command", command)
    return runs


def test_what_reading_does_not_show_is_tried_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = child(monkeypatch, "pass")
    for _ in range(2):
        sound._require.cache_clear()  # as another process would
        sound.require_sound(model)
    assert len(runs) == 1


def test_a_head_that_lived_is_known_by_its_bytes_and_the_files_size(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = child(monkeypatch, "pass")
    sound.require_sound(model)
    reads: list[Path] = []
    monkeypatch.setattr(sound, "read_head", lambda path: reads.append(path) or read_head(path))
    data = model.read_bytes()
    model.write_bytes(data[:-64] + bytes(64))  # other weights
    sound.require_sound(model)
    assert not reads
    model.write_bytes(data + bytes(32))
    sound.require_sound(model)
    assert len(reads) == 1 and len(runs) == 2
    model.write_bytes(data)
    change(model, "llama.block_count", "<I", 0)
    sound._require.cache_clear()
    with pytest.raises(BadInput, match="block_count"):
        sound.require_sound(model)


def test_a_crash_is_told_and_remembered_and_says_nothing_of_amx(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = child(monkeypatch, f"import os; os.kill(os.getpid(), {int(signal.SIGABRT)})")
    monkeypatch.setattr(probe, "has_amx", lambda: True)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"makes llama\.cpp crash"):
            sound.require_sound(model)
    assert len(runs) == 1 and probe.verdict().crashed == {}


def test_one_that_does_not_end(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, "import time; time.sleep(60)")
    monkeypatch.setattr(sound, "LEAST_S", 0.1)
    with pytest.raises(BadInput, match="was not loaded within"):
        sound.require_sound(model)
