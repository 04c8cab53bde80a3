"""How close a stage comes to the machine's roofline (Williams et al. 2009), measured on the spot.

A stage takes at least the time to read its weights from memory and the time to compute its products.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import numpy as np

from mllm_edge.bench.result import Limits
from mllm_edge.bundle.manifest import Manifest, StageEntry
from mllm_edge.machine.devices import CPU, THIS, Device
from mllm_edge.machine.facts import busy_cores, cpu_name, memory

_BYTES = 1 << 28  # read to measure memory bandwidth; larger than every cache
_WIDTH = 2048  # of the square matrices to measure compute throughput
_ROUNDS = 5
BUSY = 0.3  # of a core

# Share of the limit that well-tuned engines reach, by kind of stage: TinyChat and TensorRT Edge-LLM on Jetson for the
# language model, EfficientViT-SAM for encoders (docs/benchmarks.md). A stage below half of it is worth a look.
REACHED = {"decode": 0.65, "prefill": 0.50}
STAGE_TARGET = 0.40


def measure_limits() -> Limits:
    """Measure this machine's CPU: the best of several rounds, about a second in all, with BLAS's default threads."""
    numbers = np.ones(_BYTES // 4, np.float32)
    read = _fastest(lambda: np.dot(numbers, numbers))
    matrix = np.ones((_WIDTH, _WIDTH), np.float32)
    product = _fastest(lambda: matrix @ matrix)
    return Limits(round(_BYTES / read / 1e9, 3), round(2 * _WIDTH**3 / product / 1e12, 4))


def warn_if_busy() -> None:
    """Warn where other work would make a measurement too slow."""
    if (busy := busy_cores()) is not None and busy > BUSY:
        warnings.warn(
            f"other programs keep {busy:.1f} of this machine's cores busy, so what is measured now is too slow; "
            "measure again when it is idle",
            RuntimeWarning,
            stacklevel=2,
        )


def this_machine() -> Device:
    """This machine's CPU as a device to plan for, measured now."""
    warn_if_busy()
    limits, found = measure_limits(), memory()
    total, free = found.get("total", 0) / 1000, found.get("available", 0) / 1000
    return Device(THIS, cpu_name(), total, round(total - free, 3), limits.memory_gb_per_s, limits.matmul_tflops, CPU)


def shares(
    manifest: Manifest, limits: Limits, milliseconds: dict[str, float], tokens: int, rate: float
) -> dict[str, float]:
    """The share of the machine's limit that each stage reached.

    Args:
        manifest: the bundle's; stages without a count of operations are left out.
        limits: the machine's.
        milliseconds: median time by stage, including `prefill`.
        tokens: prefilled tokens, which are in the KV cache while decoding.
        rate: tokens decoded per second.
    """
    lm = manifest.language_model
    found = {}
    for stage in manifest.stages:
        if stage.flops and milliseconds.get(stage.name):
            found[stage.name] = _least_seconds(limits, stage.flops, _bytes(stage)) * 1000 / milliseconds[stage.name]
    if lm.flops_per_token:
        keys = [spec for part in lm.parts for spec in part.inputs if spec.name.startswith("past_key")]
        layers = lm.gguf.layers if lm.gguf else len(keys)
        attention = 2 * tokens**2 * lm.width * layers  # scores and values, half of them masked
        flops, size = tokens * lm.flops_per_token + attention, lm.bytes_per_token
        if lm.kind == "seq2seq":  # an encoder reads the prompt, and looks both ways
            flops = tokens * lm.encoder_flops_per_token + 2 * attention
            size = sum(_bytes(part) for part in lm.parts if part.name == "encoder")
        if flops > attention:
            found["prefill"] = _least_seconds(limits, flops, size) * 1000 / milliseconds["prefill"]
        cache = tokens * lm.kv_bytes_per_token * (1 if lm.gguf else 2)  # of ONNX Runtime in 32 bits
        found["decode"] = rate * _least_seconds(limits, lm.flops_per_token, lm.bytes_per_token + cache)
    return {name: round(share, 4) for name, share in found.items()}


def is_low(stage: str, share: float) -> bool:
    """Whether a stage reaches less than half of what well-tuned engines do."""
    return share < REACHED.get(stage, STAGE_TARGET) / 2


def _bytes(stage: StageEntry) -> int:
    return stage.bytes + sum(file.bytes for file in stage.data_files)


def _least_seconds(limits: Limits, flops: float, size: float) -> float:
    return max(flops / (limits.matmul_tflops * 1e12), size / (limits.memory_gb_per_s * 1e9))


def _fastest(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
