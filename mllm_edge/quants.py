"""What numbers are stored in: a language model's quantizations and KV caches, and the precisions of stages.

Of tolerances, cosine and top1 (the share of equal likeliest tokens) are at least this; relative_max is at most this:
the largest difference over the largest value of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quant:
    """A quantization of the language model.

    Attributes:
        bytes_per_weight: of a whole model, on average.
        tolerance: of parity with PyTorch.
        type: of most matrices, as the gguf package names it.
        file_type: likewise.
        k: a K-quant: llama.cpp chooses each tensor's type.
        plain: llama.cpp never repacks it.
    """

    bytes_per_weight: float
    tolerance: dict[str, float]
    type: str
    file_type: str
    k: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Precision:
    """A precision of stages: its size, and the tolerance of parity with PyTorch."""

    bytes_per_weight: float
    tolerance: dict[str, float]


@dataclass(frozen=True)
class KvType:
    """An element type of the KV cache, and whether attention is flash attention with it, as llama.cpp names it."""

    bytes_per_number: float
    flash: str


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
PLAIN = ("bf16", *(name for name, quant in QUANTS.items() if quant.plain))  # that llama.cpp never repacks
PRECISIONS = {
    "fp32": Precision(4.0, {"cosine": 0.9999, "relative_max": 1e-4}),
    "fp16": Precision(2.0, {"cosine": 0.999, "relative_max": 0.05}),
    "int8": Precision(1.0, {"cosine": 0.98, "relative_max": 0.5}),
}
# On a CPU flash attention computes in f16 whatever the cache holds, so f32 does without (measured: logits of size 10
# within 3e-6 of PyTorch's, against 7e-3); a q8_0 cache exists only with it.
KV_TYPES = {"f32": KvType(4.0, "DISABLED"), "f16": KvType(2.0, "AUTO"), "q8_0": KvType(34 / 32, "ENABLED")}
