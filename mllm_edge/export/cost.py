"""What stages cost, from their shapes alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import nn

from mllm_edge.checkpoints.tensors import Tensors
from mllm_edge.models.plan import Checkpoint

if TYPE_CHECKING:
    from mllm_edge.bundle.manifest import TensorSpec


def stage_flops(module: nn.Module, inputs: list[TensorSpec]) -> int:
    """Floating-point operations of a module's matrix products and convolutions, two per multiplication.

    Nothing is computed: weights and inputs are shapes. An axis that may vary counts as 1.
    """
    from torch.utils.flop_counter import FlopCounterMode

    shapes = {
        name: tensor.detach().to("meta") for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    feeds = [
        torch.empty(
            [size if isinstance(size, int) else 1 for size in spec.shape],
            dtype=getattr(torch, spec.dtype),
            device="meta",
        )
        for spec in inputs
    ]
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(module, shapes, tuple(feeds))
    return int(counter.get_total_flops())


def without_weights(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with shapes in the place of its weights; build its stages under `torch.device("meta")`."""
    tensors = checkpoint.tensors
    shape = tensors.shape if isinstance(tensors, Tensors) else lambda name: tuple(tensors[name].shape)
    shapes = Tensors(list(tensors), lambda name: torch.empty(shape(name), device="meta"), shape)
    return dataclasses.replace(checkpoint, tensors=shapes)
