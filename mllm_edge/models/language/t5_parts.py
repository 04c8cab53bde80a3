"""What of a T5 is lowered to the graphs of `engines/parts_language_model.py`, and the reference they are compared with.

Where there are adapters, the first row of a prompt is not text: its first two channels are 1 at the type of the task
(`task_rows`). So the language model still reads nothing but a prompt, and one bundle has both types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.models.language.t5 import T5, KeysValues, T5Dims

TASKS = 2


def task_rows(dims: T5Dims) -> np.ndarray:
    """What stands before a prompt in a task of each type: float32 [2,1,D]."""
    rows = np.zeros((TASKS, 1, dims.width), np.float32)
    rows[0, 0, 0] = rows[1, 0, 1] = 1
    return rows


def _task(dims: T5Dims, prompt: Tensor) -> tuple[Tensor | None, Tensor]:
    """The type of task [2] and the rest of a prompt [1,S,D]."""
    return (prompt[0, 0, :TASKS], prompt[:, 1:]) if dims.bottleneck else (None, prompt)


class EmbedPart(nn.Module):
    """ids int64 [B,T] -> rows of the table [B,T,D]."""

    def __init__(self, model: T5):
        super().__init__()
        self.table = model.shared

    def forward(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.table(ids)
        return rows


class EncoderPart(nn.Module):
    """A prompt [1,S,D] -> keys and values for each layer of the decoder [1,H,S,d], and the type of task [2]."""

    def __init__(self, model: T5):
        super().__init__()
        self.dims, self.encoder = model.dims, model.encoder
        blocks: list = list(model.decoder.block)  # type: ignore[type-arg]
        self.cross = nn.ModuleList(block.layer[1].EncDecAttention for block in blocks)

    def forward(self, embeds: Tensor) -> tuple[Tensor, ...]:
        task, text = _task(self.dims, embeds)
        encoded = self.encoder(text, task)
        found = [tensor for attention in self.cross for tensor in attention.keys_values(encoded)]  # type: ignore[operator]
        return (*found, task) if task is not None else tuple(found)


class DecoderPart(nn.Module):
    """Tokens [B,T,D] after the `length` [1] whose keys and values the caches hold: see `part_specs` for the order."""

    def __init__(self, model: T5):
        super().__init__()
        self.model = model

    def forward(self, embeds: Tensor, length: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        layers = self.model.dims.layers
        has_task = self.model.dims.bottleneck > 0
        cross, past = given[: 2 * layers], given[2 * layers + has_task :]
        task = given[2 * layers] if has_task else None
        states, new = self.model.decoder(embeds, _paired(cross), _paired(past), length, task)
        return (self.model.logits(states[:, -1]), states, *(tensor for pair in new for tensor in pair))


def wide_products(dims: T5Dims) -> tuple[str, ...]:
    """Modules whose inputs leave the range of fp16 (transformers' `_keep_in_fp32_modules`), in both stacks."""
    stacks = (("encoder", 1), ("model.decoder", 2))
    return tuple(
        f"{stack}.block.{layer}.layer.{place}.DenseReluDense.wo"
        for stack, place in stacks
        for layer in range(dims.layers)
    )


def _paired(tensors: Sequence[Tensor]) -> list[KeysValues]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def part_specs(dims: T5Dims) -> dict[str, tuple[list[TensorSpec], list[TensorSpec]]]:
    """Inputs and outputs of each part, in order."""

    def caches(kind: str, batch: int | str, length: str) -> list[TensorSpec]:
        shape = [batch, dims.heads, length, dims.head_width]
        return [
            TensorSpec(f"{kind}_{name}_{layer}", "float32", shape)
            for layer in range(dims.layers)
            for name in ("key", "value")
        ]

    def cross(length: str) -> list[TensorSpec]:
        task = [TensorSpec("cross_task", "float32", [TASKS])] if dims.bottleneck else []
        return [*caches("cross", 1, length), *task]

    ids = TensorSpec("ids", "int64", ["sequences", "tokens"])
    length = TensorSpec("length", "int64", [1])
    embeds = TensorSpec("embeds", "float32", ["sequences", "tokens", dims.width])
    return {
        "embed": ([ids], [embeds]),
        "encoder": (
            [TensorSpec("embeds", "float32", [1, "rows", dims.width])],
            cross("rows - 1" if dims.bottleneck else "rows"),
        ),
        "decoder": (
            [embeds, length, *cross("positions"), *caches("past", "sequences", "capacity")],
            [
                TensorSpec("logits", "float32", ["sequences", dims.vocabulary]),
                TensorSpec("hidden", "float32", ["sequences", "tokens", dims.width]),
                *caches("new", "sequences", "tokens"),
            ],
        ),
    }


def extended(past: Sequence[KeysValues], new: Sequence[KeysValues]) -> list[KeysValues]:
    """Keys and values with those of further tokens behind them."""
    if not past:
        return [*new]
    return [(torch.cat([k, a], 2), torch.cat([v, b], 2)) for (k, v), (a, b) in zip(past, new, strict=True)]


class T5Reference:
    """See `reference.Reference`; answers begin with token `start`."""

    def __init__(self, model: T5, start: int = 0):
        self._model, self._start = model.eval(), start

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Rows of the embedding table, float32 [T,D]."""
        rows: np.ndarray = self._model.shared.weight[list(ids)].detach().numpy()
        return rows

    @torch.no_grad()
    def forced(self, prompt: np.ndarray, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Logits [n+1,V] and states [n+1,D] after a prompt [S,D] and each of n tokens."""
        cross, task = self._read(prompt)
        ids = torch.tensor([[self._start, *tokens]])
        states, _ = self._model.decoder(self._model.shared(ids), cross, task=task)
        return self._model.logits(states)[0].numpy(), states[0].numpy()

    @torch.no_grad()
    def generate(self, prompt: np.ndarray, most: int, is_end: Callable[[int], bool] = lambda _: False) -> list[int]:
        """Greedy tokens after a prompt [S,D], one by one with a KV cache."""
        cross, task = self._read(prompt)
        tokens = [self._start]
        past: list[KeysValues] = []
        while len(tokens) <= most and not (len(tokens) > 1 and is_end(tokens[-1])):
            ids = torch.tensor([tokens[-1:]])
            states, new = self._model.decoder(self._model.shared(ids), cross, past, task=task)
            past = extended(past, new)
            tokens.append(int(self._model.logits(states)[0, -1].argmax()))
        return tokens[1:]

    def _read(self, prompt: np.ndarray) -> tuple[list[KeysValues], Tensor | None]:
        task, text = _task(self._model.dims, torch.from_numpy(prompt)[None])
        return self._model.decoder.cross(self._model.encoder(text, task)), task
