"""Token embeddings, read by rows from the language model's own file, so that no second copy is in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle.manifest import EmbeddingTable
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.interface import Floats

_BLOCK = 32  # weights that share a scale in Q8_0: 2 bytes of scale, 32 of weights (ggml-common.h, block_q8_0)
_Q8_0 = np.dtype([("scale", "<f2"), ("weights", "i1", (_BLOCK,))])


class EmbeddingRows:
    """The embedding table of a GGUF file, memory-mapped.

    Raises:
        BadInput: a dtype that cannot be read by rows, or a table that lies outside the file.
    """

    def __init__(self, path: Path, table: EmbeddingTable):
        rows, width = table.shape
        layouts: dict[str, tuple[np.dtype[Any], int]] = {
            "F32": (np.dtype("<f4"), width),
            "F16": (np.dtype("<f2"), width),
            "Q8_0": (_Q8_0, width // _BLOCK),
        }
        if table.dtype not in layouts or (table.dtype == "Q8_0" and width % _BLOCK):
            raise BadInput(f"{path}: embedding {table.dtype} {table.shape} cannot be read; export the bundle again")
        dtype, columns = layouts[table.dtype]
        if table.offset < 0 or table.offset + rows * columns * dtype.itemsize > path.stat().st_size:
            raise BadInput(f"{path}: the embedding table lies outside the file; export the bundle again")
        self._width = width
        self._rows = np.memmap(path, dtype, "r", table.offset, (rows, columns))

    def __getitem__(self, ids: Sequence[int]) -> Floats:
        """Rows `ids` as float32 [T,D]. Raises MllmEdgeError for an id outside the vocabulary."""
        index = np.asarray(ids, np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self._rows):
            raise MllmEdgeError(f"token ids must be below {len(self._rows)}; got {index.min()} to {index.max()}")
        rows = self._rows[index]
        if rows.dtype != _Q8_0:
            return np.asarray(rows, np.float32)
        values = rows["weights"].astype(np.float32) * rows["scale"].astype(np.float32)[..., None]
        return np.asarray(values.reshape(len(index), self._width), np.float32)
