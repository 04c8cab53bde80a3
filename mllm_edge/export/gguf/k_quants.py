"""Block quantization by llama.cpp's own code, one tensor at a time, without a 16-bit copy of the model."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mllm_edge.errors import MllmEdgeError
from mllm_edge.quants import QUANTS
from mllm_edge.runtime.engines.llama.library import library, recent_errors

TYPE = gguf.GGMLQuantizationType
_SKETCHED_ROWS = 2  # of one row llama.cpp takes a matrix for a vector
_ROWS_AT_ONCE = 256  # that a thread quantizes before it takes the next


def chosen_types(
    architecture: str,
    shapes: Mapping[str, tuple[int, ...]],
    quant: str,
    embedding: TYPE,
    write_head: Callable[[gguf.GGUFWriter], None],
) -> dict[str, TYPE]:
    """The type that llama.cpp gives each tensor in a mixture such as q4_k_m.

    The mixtures depend on names, layers and row lengths by rules inside `llama_model_quantize`. So it quantizes a
    sketch of the model, with two rows per matrix, whose types are read back.

    Args:
        architecture: as llama.cpp calls it.
        shapes: name in the GGUF file -> shape.
        quant: a K-quant.
        embedding: the type of the token embedding.
        write_head: writes the model's metadata.

    Raises:
        MllmEdgeError: llama.cpp refuses the model.
    """
    llama = library()
    with tempfile.TemporaryDirectory() as folder:
        sketch, result = Path(folder) / "sketch.gguf", Path(folder) / "result.gguf"
        writer = gguf.GGUFWriter(sketch, architecture)
        write_head(writer)
        for name, shape in shapes.items():
            small = shape if len(shape) == 1 else (_SKETCHED_ROWS, shape[-1])
            writer.add_tensor(name, np.zeros(small, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        settings = llama.llama_model_quantize_default_params()
        settings.ftype = int(gguf.LlamaFileType[QUANTS[quant].file_type])
        settings.token_embedding_type = int(embedding)
        settings.nthread = 1
        recent_errors.clear()
        status = llama.llama_model_quantize(os.fsencode(sketch), os.fsencode(result), settings)
        if status != 0:
            reason = "; ".join(recent_errors) or f"status {status}"
            raise MllmEdgeError(f"llama.cpp could not quantize to {quant} ({reason}); use --quant q8_0")
        reader = gguf.GGUFReader(result)
        types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
        del reader.data  # the memory map
    return types


def quantize_rows(matrix: np.ndarray, kind: TYPE) -> np.ndarray:
    """Quantize a float32 matrix [R,C] to blocks of type `kind`, uint8 [R,bytes of a row], by llama.cpp's code."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = matrix.shape
    source = np.ascontiguousarray(matrix, np.float32)
    result = np.empty((rows, columns // block * size), np.uint8)
    chunk = _quantizer()

    def quantize(first: int) -> None:
        count = min(_ROWS_AT_ONCE, rows - first)
        chunk(int(kind), source.ctypes.data, result.ctypes.data, first * columns, count, columns, None)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # ctypes releases the GIL
        list(pool.map(quantize, range(0, rows, _ROWS_AT_ONCE)))
    return result


def _quantizer() -> Any:
    library()
    from llama_cpp import _ggml

    chunk = _ggml.libggml.ggml_quantize_chunk
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    chunk.restype = ctypes.c_size_t
    return chunk
