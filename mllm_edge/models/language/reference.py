"""What verification asks of a language model in PyTorch, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class DecoderDims(Protocol):
    """The counts of a language model."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_width(self) -> int: ...
    @property
    def attention_width(self) -> int:
        """Channels of a layer's queries."""
        ...

    @property
    def weights(self) -> int:
        """How many weights it has."""
        ...

    @property
    def product_weights(self) -> int:
        """The weights that every token of an answer is multiplied with."""
        ...

    @property
    def prompt_weights(self) -> int:
        """The weights that every token of a prompt is multiplied with."""
        ...


class Reference(Protocol):
    """A language model in fp32 PyTorch."""

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Rows of the embedding table, float32 [T,D]."""
        ...

    def forced(self, prompt: np.ndarray, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read a prompt [T,D] and n tokens (teacher forcing).

        Returns:
            Logits float32 [n+1,V] and states after the final norm [n+1,D]: row i after i tokens, so that it predicts
            token i and is the state at token i-1.
        """
        ...

    def generate(self, prompt: np.ndarray, most: int, is_end: Callable[[int], bool] = lambda _: False) -> list[int]:
        """Greedy tokens after a prompt [T,D], at most `most`, the one that ends among them."""
        ...
