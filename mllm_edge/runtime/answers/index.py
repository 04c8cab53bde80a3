"""An index of pictures: their embeddings in a file that is mapped and not read, and where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from mllm_edge.bundle.read import read_text
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.interface import Floats

VECTORS, ITEMS = "vectors.npy", "items.json"


class Index:
    """A folder with `vectors.npy`, float16 or float32 [N,d] of length 1, and `items.json`, a list of N picture files
    relative to it.

    Raises:
        BadInput: it is none.
    """

    def __init__(self, folder: Path):
        try:
            self._vectors = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
            items = json.loads(read_text(folder / ITEMS, 256 << 20))
        except (OSError, ValueError, EOFError, RecursionError) as error:
            raise BadInput(f"{folder} is no index of pictures ({error}); make one again") from None
        whole = isinstance(items, list) and all(isinstance(item, str) for item in items)
        if not whole or self._vectors.ndim != 2 or len(items) != len(self._vectors) or not len(items):
            raise BadInput(f"{folder} is no index of pictures ({ITEMS} and {VECTORS} do not fit); make one again")
        self._folder, self._items = folder, items

    @property
    def width(self) -> int:
        """d, of its embeddings."""
        return int(self._vectors.shape[1])

    def nearest(self, query: Floats) -> tuple[Path, float]:
        """The picture whose embedding is nearest to `query` [d], and their cosine.

        Raises:
            BadInput: it lies outside the index.
        """
        scores = self._vectors @ (query / np.linalg.norm(query)).astype(self._vectors.dtype)  # [N]
        best = int(scores.argmax())
        path = self._folder / self._items[best]
        if not os.path.realpath(path).startswith(os.path.realpath(self._folder) + os.sep):
            what = f"{self._folder / ITEMS} points outside its folder ({self._items[best]!r})"
            raise BadInput(f"{what}; do not use this index")
        return path, float(scores[best])
