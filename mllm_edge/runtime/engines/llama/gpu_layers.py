"""How many layers of the language model fit a GPU's memory."""

from __future__ import annotations

import ctypes
import math
import warnings
from types import ModuleType

from mllm_edge.bundle.manifest import GgufDetails
from mllm_edge.quants import KV_TYPES
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.memory import SCRATCH

GPU, INTEGRATED_GPU = 1, 2  # ggml_backend_dev_type
TABLE_BYTES = {"F32": 4.0, "F16": 2.0, "Q8_0": 34 / 32}
MARGIN = 300_000_000  # bytes for CUDA itself and for other programs


def layers(llama: ModuleType, entry: GgufDetails, options: Options) -> int:
    """Layers for llama.cpp's `n_gpu_layers`, the head counted as one; says so where it is not all of them."""
    if options.gpu_layers is not None:
        return options.gpu_layers
    free = free_memory(llama)
    if free is None:
        return entry.layers + 1
    fitting = layers_that_fit(entry, options, free - options.gpu_reserve)
    if fitting <= entry.layers:
        warnings.warn(
            f"{fitting} of the language model's {entry.layers + 1} layers fit the GPU's free memory "
            f"({free / 1e9:.1f} GB), the others run on the CPU; choose a smaller --context or --quant, or set "
            "--gpu-layers",
            RuntimeWarning,
            stacklevel=2,
        )
    return fitting


def layers_that_fit(entry: GgufDetails, options: Options, free: int) -> int:
    """The most layers, with their part of the KV cache, for which `free` bytes suffice.

    The embedding table stays on the CPU; a head of the same size comes last. Layers count as equally large, including
    the head's bytes, which the file may share with the table: the estimate is never too low.
    """
    table = math.prod(entry.embedding.shape) * TABLE_BYTES.get(entry.embedding.dtype, 4.0)
    cache = 2 * entry.kv_width * KV_TYPES[options.kv_type] * options.context
    one = max(entry.bytes - table, 0) / max(entry.layers, 1) + cache
    room = free - SCRATCH - MARGIN
    if room >= entry.layers * one + table:
        return entry.layers + 1
    return max(0, min(entry.layers, int(room / one)))


def free_memory(llama: ModuleType) -> int | None:
    """Free bytes of the first GPU that llama.cpp sees; None if unknown."""
    try:
        count, get = llama._lib.ggml_backend_dev_count, llama._lib.ggml_backend_dev_get
        kind, memory = llama._lib.ggml_backend_dev_type, llama._lib.ggml_backend_dev_memory
    except AttributeError:
        return None
    count.restype, get.restype, kind.restype = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    get.argtypes, kind.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
    memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    for device in (get(index) for index in range(count())):
        if kind(device) in (GPU, INTEGRATED_GPU):
            memory(device, ctypes.byref(free), ctypes.byref(total))
            return free.value or None
    return None
