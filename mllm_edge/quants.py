"""What numbers are stored in: a language model's quantizations and KV caches, and the precisions of stages.

Of tolerances, cosine and top1 (the share of equal likeliest tokens) are at least this; relative_max is at most this:
the largest difference over the largest value of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Of stages: the size, and the tolerance of parity with PyTorch."""

    bytes_per_weight: float
    tolerance: dict[str, float]


@dataclass(frozen=True)
class Quant(Precision):
    """Of the language model, whose size is an average. `type` (of most matrices) and `file_type` are the gguf package's
    names; llama.cpp chooses each tensor's type of a `k` (a K-quant), and never repacks a `plain` one."""

    type: str
    file_type: str
    k: bool = False
    plain: bool = False


def _allowed(cosine: float, relative_max: float, top1: float) -> dict[str, float]:
    return {"cosine": cosine, "relative_max": relative_max, "top1": top1}


QUANTS = {
    "f32": Quant(4.0, _allowed(0.9999, 1e-3, 1.0), "F32", "ALL_F32", plain=True),
    "f16": Quant(2.0, _allowed(0.9999, 0.01, 0.95), "F16", "MOSTLY_F16", plain=True),
    "q8_0": Quant(1.07, _allowed(0.995, 0.1, 0.85), "Q8_0", "MOSTLY_Q8_0"),
    "q6_k": Quant(0.83, _allowed(0.99, 0.2, 0.8), "Q6_K", "MOSTLY_Q6_K", k=True),
    "q5_k_m": Quant(0.72, _allowed(0.98, 0.3, 0.7), "Q5_K", "MOSTLY_Q5_K_M", k=True),
    "q4_k_m": Quant(0.62, _allowed(0.95, 0.5, 0.5), "Q4_K", "MOSTLY_Q4_K_M", k=True),
}
ONNX_QUANTS = {  # of a language model that ONNX Runtime runs
    "fp32": Precision(4.0, _allowed(0.9999, 1e-3, 1.0)),
    "fp16": Precision(2.0, _allowed(0.999, 0.05, 0.9)),
    "int8": Precision(1.1, _allowed(0.98, 0.3, 0.8)),
    "int4": Precision(0.65, _allowed(0.95, 0.5, 0.5)),
}
ENGINES: dict[str, Mapping[str, Precision]] = {"gguf": QUANTS, "onnx": ONNX_QUANTS}
USUAL = {"gguf": "q8_0", "onnx": "int8"}
SMALL = {"gguf": "q4_k_m", "onnx": "int4"}
CACHES = {"gguf": "f16", "onnx": "f32"}  # their usual KV caches
PLAIN = ("bf16", *(name for name, quant in QUANTS.items() if quant.plain))  # that llama.cpp never repacks
PRECISIONS = {
    "fp32": Precision(4.0, {"cosine": 0.9999, "relative_max": 1e-4}),
    "fp16": Precision(2.0, {"cosine": 0.999, "relative_max": 0.05}),
    "int8": Precision(1.0, {"cosine": 0.98, "relative_max": 0.5}),
}
KV_TYPES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}  # of the KV cache, bytes per number
