"""A part of a checkpoint, and a module filled with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Part(Mapping[str, Tensor]):
    """The tensors below a prefix, still lazy."""

    def __init__(self, tensors: Mapping[str, Tensor], names: list[str], prefix: str):
        self.tensors, self.prefix = tensors, prefix
        self.names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Decoder(Mapping[str, Tensor]):
    """A decoder's tensors, whose `head` is its embedding table, `table`, where they are tied."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        table: str = "model.embed_tokens.weight",
        head: str = "lm_head.weight",
    ):
        self._tensors, self._table, self._head = tensors, table, head

    def __getitem__(self, name: str) -> Tensor:
        tied = name == self._head and name not in self._tensors
        return self._tensors[self._table if tied else name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@torch.no_grad()
def filled(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The module with its weights loaded one by one, so that there is never a second copy of all of them."""
    for name, weight in module.state_dict().items():
        weight.copy_(tensors[name])
    return module.eval()
