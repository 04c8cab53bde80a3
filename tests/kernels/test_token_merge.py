"""Token merging: cases counted by hand, and the laws of a merge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.kernels.token_merge import TokenMerge, matching, merge_tokens
from mllm_edge.models.plan import StageExport

X, Y, Z = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


def test_the_most_similar_pair_becomes_its_mean_where_the_odd_one_stands() -> None:
    near_x = [0.9, 0.1, 0.0]
    embeds = torch.tensor([[near_x, Y, Z, X]])  # 0 is nearest to 3 (cosine 0.99), 2 to none (0)
    merged = merge_tokens(embeds, 3)
    assert torch.allclose(merged, torch.tensor([[Y, Z, [0.95, 0.05, 0.0]]]))


def test_among_equals_the_first_pair_is_merged() -> None:
    embeds = torch.tensor([[X, X, X, X, Y]])
    assert torch.equal(matching(embeds, 1)[0].argmax(0), torch.tensor([0, 0, 1, 2, 3]))
    assert torch.equal(matching(embeds, 2)[0].argmax(0), torch.tensor([0, 0, 0, 1, 2]))


def test_a_token_of_two_parts_counts_twice_in_the_next_mean() -> None:
    a, b, c = [3.0, 0.0, 0.0], [6.0, 0.0, 0.0], [9.0, 0.1, 0.0]
    merged = merge_tokens(torch.tensor([[a, b, c]]), 1)  # a and b first, then with c
    assert torch.allclose(merged, torch.tensor([[[6.0, 0.1 / 3, 0.0]]]))


@given(st.integers(1, 40), st.data())
def test_nothing_is_lost(number: int, data: st.DataObject) -> None:
    tokens = data.draw(st.integers(1, number))
    embeds = torch.randn(2, number, 5, generator=torch.Generator().manual_seed(number))
    merged = merge_tokens(embeds, tokens)
    assert merged.shape == (2, tokens, 5)
    assert merged.amax() <= embeds.amax() + 1e-6
    if tokens == number:
        assert torch.equal(merged, embeds)
    if tokens == 1:
        assert torch.allclose(merged[:, 0], embeds.mean(dim=1), atol=1e-5)
    if number == 1:
        return
    part = data.draw(st.integers(1, number // 2))
    matrix = matching(embeds, part)
    assert torch.equal(matrix.sum(dim=1), torch.ones(2, number))  # each token goes to one place
    assert (matrix.sum(dim=2) >= 1).all()  # and no place is empty


@pytest.mark.parametrize("tokens", [0, 5])
def test_more_tokens_than_there_are_is_refused(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"cannot merge 4 tokens to {tokens}"):
        merge_tokens(torch.zeros(1, 4, 2), tokens)


@pytest.mark.parametrize(("number", "tokens"), [(64, 32), (64, 10), (9, 5)])
def test_the_exported_graph_merges_the_same_without_scatter(tmp_path: Path, number: int, tokens: int) -> None:
    stage = StageExport(
        "merge",
        lambda: TokenMerge(tokens),
        [TensorSpec("features", "float32", [1, number, 8])],
        [TensorSpec("image_embeds", "float32", [1, tokens, 8])],
    )
    export_stage(stage, tmp_path / "merge.onnx", "fp32")
    operators = {node.op_type for node in onnx.load(tmp_path / "merge.onnx").graph.node}
    assert not any("Scatter" in name or name in ("NonZero", "Loop", "If", "Unique") for name in operators)
    session = onnxruntime.InferenceSession(tmp_path / "merge.onnx", providers=["CPUExecutionProvider"])
    for seed in range(5):
        features = np.random.default_rng(seed).standard_normal((1, number, 8), np.float32)
        (merged,) = session.run(None, {"features": features})
        np.testing.assert_allclose(merged, merge_tokens(torch.from_numpy(features), tokens).numpy(), atol=1e-5)
