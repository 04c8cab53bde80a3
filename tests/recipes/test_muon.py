"""Muon against singular values by numpy, and what it leaves to AdamW."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mllm_edge.recipes.muon import optimizer, orthogonal
from mllm_edge.recipes.recipe import Recipe


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 24), st.integers(2, 24), st.integers(0, 99))
def test_singular_values_come_near_one_and_directions_stay(count: int, rows: int, columns: int, seed: int) -> None:
    matrices = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    found = orthogonal(matrices).numpy()
    for before, after in zip(matrices.numpy(), found, strict=True):
        left, values, right = np.linalg.svd(before, full_matrices=False)
        turned = left.T @ after @ right.T  # diagonal where the singular vectors are the same
        seen = values > 0.05 * values[0]  # tiny ones need more rounds
        assert np.all((np.diag(turned)[seen] > 0.5) & (np.diag(turned)[seen] < 1.3))
        assert np.allclose(turned, np.diag(np.diag(turned)), atol=1e-3)
    assert not orthogonal(torch.zeros(1, rows, columns)).any()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.lm_head = nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 5)


def test_matrices_of_linear_layers_take_turned_steps_and_all_else_adams() -> None:
    torch.manual_seed(0)
    model = Small()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    made = optimizer(model, [{"params": list(model.parameters())}], Recipe("t", "o", lr=1e-3, muon_lr=0.5))
    loss = model.lm_head(model.inner(model.table(torch.tensor([0, 1, 2])))).square().sum()
    loss.backward()
    made.step()
    moved = {name: tensor.detach() - before[name] for name, tensor in model.named_parameters()}
    expected = orthogonal(model.inner.weight.grad[None])[0] * -0.5 * (6 / 4) ** 0.5
    torch.testing.assert_close(moved["inner.weight"], expected)
    for name in ("inner.bias", "lm_head.weight", "lm_head.bias"):  # Adam's first step has the size of its rate
        torch.testing.assert_close(moved[name].abs(), torch.full_like(moved[name], 1e-3), rtol=1e-3, atol=1e-9)
    assert (
        moved["table.weight"][:3].abs().max() == pytest.approx(1e-3, rel=1e-3) and not moved["table.weight"][3:].any()
    )


def test_a_group_keeps_its_share_of_the_rate() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": model[0].parameters()}, {"params": list(model[1].parameters()), "lr": 1e-4}]
    groups[0]["params"] = list(groups[0]["params"])
    made = optimizer(model, groups, Recipe("t", "o", lr=1e-3, muon_lr=0.02))
    assert [(group["muon"], group["lr"]) for group in made.param_groups] == [
        (True, 0.02), (False, 1e-3), (True, pytest.approx(0.002)), (False, 1e-4),
    ]  # fmt: skip
    assert not any(g["muon"] for g in optimizer(model, groups, Recipe("t", "o", lr=1e-3)).param_groups)
