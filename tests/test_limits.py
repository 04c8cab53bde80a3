"""How close stages come to the machine's limits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mllm_edge import bench
from mllm_edge.bench import limits
from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.bundle.read import read_manifest

MACHINE = bench.Limits(memory_gb_per_s=10.0, matmul_tflops=0.1)


def test_shares_of_the_limit_are_the_hand_computed_ones(folder: Path) -> None:
    manifest = read_manifest(folder)
    # 2 GFLOP at 0.1 TFLOP/s take 20 ms; 1 GB at 10 GB/s takes 100 ms, so the second stage is bound by memory.
    stages = [
        dataclasses.replace(manifest.stages[0], name="one", flops=2_000_000_000, bytes=1000),
        dataclasses.replace(manifest.stages[0], name="two", flops=2_000_000_000, bytes=1_000_000_000),
    ]
    assert manifest.language_model.gguf is not None
    details = dataclasses.replace(manifest.language_model.gguf, layers=10)
    counts = {"flops_per_token": 10_000_000, "bytes_per_token": 99_000_000, "kv_bytes_per_token": 10_000}
    lm = dataclasses.replace(manifest.language_model, **counts, gguf=details, width=500)
    manifest = dataclasses.replace(manifest, stages=stages, language_model=lm)
    times = {"preprocess": 1.0, "one": 40.0, "two": 125.0, "prefill": 100.0}
    found = limits.shares(manifest, MACHINE, times, tokens=100, rate=50.0)
    # Prefill: 100 x 10 MFLOP + 2 x 100^2 x 500 x 10 = 1.1 GFLOP = 11 ms. Decode: 99 MB + 100 x 10 kB = 100 MB = 10 ms.
    assert found == {"one": 0.5, "two": 0.8, "prefill": 0.11, "decode": 0.5}
    assert [stage for stage, share in found.items() if limits.is_low(stage, share)] == ["prefill"]


def test_an_encoder_reads_the_prompt_both_ways(folder: Path) -> None:
    manifest = read_manifest(folder)
    key = TensorSpec("past_key_0", "float32", [1, 2, "past", 5])
    encoder = dataclasses.replace(manifest.stages[0], name="encoder", bytes=99_000_000, data_files=[])
    decoder = dataclasses.replace(encoder, name="decoder", inputs=[key] * 10, bytes=1)
    counts = {"flops_per_token": 10_000_000, "encoder_flops_per_token": 20_000_000, "bytes_per_token": 98_000_000}
    lm = dataclasses.replace(
        manifest.language_model, **counts, kv_bytes_per_token=10_000, gguf=None, kind="seq2seq", width=500,
        parts=[encoder, decoder],
    )  # fmt: skip
    manifest = dataclasses.replace(manifest, stages=[], language_model=lm)
    # Prefill: 100 x 20 MFLOP + 4 x 100^2 x 500 x 10 = 2.2 GFLOP = 22 ms, more than 99 MB take. Decode: 98 MB + 2 x 1
    # MB, as ONNX Runtime's cache has 32 bits, = 10 ms.
    found = limits.shares(manifest, MACHINE, {"prefill": 100.0}, tokens=100, rate=50.0)
    assert found == {"prefill": 0.22, "decode": 0.5}


def test_what_was_not_counted_has_no_share(folder: Path) -> None:
    manifest = read_manifest(folder)
    stages = [dataclasses.replace(stage, flops=0) for stage in manifest.stages]
    lm = dataclasses.replace(manifest.language_model, flops_per_token=0)
    manifest = dataclasses.replace(manifest, stages=stages, language_model=lm)
    assert limits.shares(manifest, MACHINE, {"vision_encoder": 1.0, "prefill": 1.0}, 10, 1.0) == {}


def test_limits_are_measured() -> None:
    found = limits.measure_limits()
    assert 0.1 < found.memory_gb_per_s < 10_000
    assert 0.001 < found.matmul_tflops < 1000
