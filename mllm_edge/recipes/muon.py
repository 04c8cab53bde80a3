"""Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"): momentum whose singular values
are made alike before a matrix takes its step, so that its rare directions learn as fast as its common ones.

Not `torch.optim.Muon`: that multiplies in bf16, one matrix after another, which on a CPU without bf16 took 15 times as
long as this (3.2 s against 0.2 for the T5 of LION tiny), several times the rest of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mllm_edge.recipes.recipe import Recipe

MOMENTUM = 0.95
ROUNDS = 5  # of Newton and Schulz
QUINTIC = (3.4445, -4.7750, 2.0315)  # takes singular values from (0,1] near 1


def optimizer(model: nn.Module, groups: list[dict[str, Any]], recipe: Recipe) -> AdamW:
    """AdamW for a task's groups of parameters; with `recipe.muon_lr` the matrices of linear layers learn by Muon at
    that rate, all but those that give the logits of words."""
    matrices = set()
    if recipe.muon_lr:
        matrices = {
            id(module.weight)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith("lm_head")
        }
    split: list[dict[str, Any]] = []
    for group in groups:
        mine = [p for p in group["params"] if id(p) in matrices]
        others = [p for p in group["params"] if id(p) not in matrices]
        if mine:
            share = group.get("lr", recipe.lr) / recipe.lr
            split.append({**group, "params": mine, "lr": share * recipe.muon_lr, "muon": True})
        if others:
            split.append({**group, "params": others, "muon": False})
    return Muon(split, lr=recipe.lr, weight_decay=recipe.weight_decay)


class Muon(AdamW):
    """AdamW, but for the groups with a true `muon`."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)  # type: ignore[arg-type]
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._turn(group)
        return loss

    def _turn(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
            alike[weight.shape].append((weight, torch.lerp(weight.grad, state["momentum"], MOMENTUM)))
        for (rows, columns), pairs in alike.items():
            steps = orthogonal(torch.stack([step for _, step in pairs]).float())
            rate = group["lr"] * max(1.0, rows / columns) ** 0.5
            for (weight, _), step in zip(pairs, steps, strict=True):
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(step, alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """[K,M,N] -> the same with singular values between about 0.7 and 1.2; 0 stays 0."""
    a, b, c = QUINTIC
    lying = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if lying else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.transpose(1, 2) if lying else x
