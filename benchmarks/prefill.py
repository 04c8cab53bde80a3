"""Prefill and decoding of GGUF files by llama.cpp alone, with and without repacked weights (docs/performance.md).

python benchmarks/prefill.py my.bundle/language_model.gguf [--threads 2] [--micro-batch 512]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from typing import Any

import numpy as np

POSITIONS = (640, 208)  # a picture of 576 tokens with 64 of text, and one merged to 144
REPEATS, STEPS = 2, 12
FLASH = {"auto": -1, "off": 0, "on": 1}


def measure(path: str, repacked: bool, positions: int, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a prefill, milliseconds of a decoding step after it: medians, without the first prefill."""
    from mllm_edge.runtime.engines.llama.library import library

    llama: Any = library()
    loading = llama.llama_model_default_params()
    loading.use_extra_bufts, loading.n_gpu_layers = repacked, 0
    model = llama.llama_model_load_from_file(os.fsencode(path), loading)
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = 2048
    settings.n_ubatch, settings.flash_attn_type = options.micro_batch, FLASH[options.flash_attention]
    settings.n_threads = settings.n_threads_batch = options.threads
    context = llama.llama_init_from_model(model, settings)
    width = llama.llama_model_n_embd(model)
    embeds = np.random.default_rng(0).standard_normal((positions, width), np.float32) * 0.02
    prefills = []
    for _ in range(1 + REPEATS):
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        batch = llama.llama_batch(n_tokens=positions)
        batch.embd = embeds.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        prefills.append(_seconds(llama, context, batch))
    token = (ctypes.c_int32 * 1)(5)
    steps = [_seconds(llama, context, llama.llama_batch_get_one(token, 1)) for _ in range(STEPS)]
    llama.llama_free(context)
    llama.llama_model_free(model)
    return statistics.median(prefills[1:]), 1000 * statistics.median(steps)


def _seconds(llama: Any, context: int, batch: Any) -> float:
    started = time.perf_counter()
    if llama.llama_decode(context, batch) != 0:
        raise SystemExit("llama.cpp could not decode")
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=512)
    parser.add_argument("--flash-attention", choices=FLASH, default="auto")
    options = parser.parse_args()
    for path in options.gguf:
        for repacked in (True, False):
            for positions in POSITIONS:
                prefill, step = measure(path, repacked, positions, options)
                form = "repacked" if repacked else "as it is"
                print(f"{path}, {form}: {positions} positions {prefill:.2f} s, a token {step:.1f} ms", flush=True)


if __name__ == "__main__":
    main()
