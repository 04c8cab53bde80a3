"""Swin against transformers' class on the same random weights."""

import pytest
import torch
from transformers import SwinConfig, SwinModel

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.swin import Swin, SwinDims


def named(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names as RAM and we have them."""
    replaced = {
        "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
        "embeddings.norm.": "patch_embed.norm.",
        "encoder.layers.": "layers.",
        "layernorm_before.": "norm1.",
        "layernorm_after.": "norm2.",
        "layernorm.": "norm.",
        "attention.relative_position_bias.": "attn.",
        "attention.o_proj.": "attn.proj.",
    }
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        for theirs, ours in replaced.items():
            name = name.replace(theirs, ours)
        if ".attention." in name:  # q_proj, k_proj, v_proj, in this order
            before, _, _, kind = name.rsplit(".", 3)
            whole = f"{before}.attn.qkv.{kind}"
            found[whole] = torch.cat([found[whole], tensor]) if whole in found else tensor
        else:
            found[name] = tensor
    return found


@pytest.mark.parametrize(("side", "window"), [(64, 4), (32, 4)], ids=["windows", "last-map-is-one-window"])
def test_features_are_those_of_transformers(side: int, window: int) -> None:
    dims = SwinDims(image_size=side, width=16, depths=(2, 2), heads=(2, 4), window=window)
    config = SwinConfig(
        image_size=side,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=window,
        drop_path_rate=0.0,
    )
    theirs = SwinModel(config, add_pooling_layer=False).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
        ours = Swin(dims).eval()
        ours.load_state_dict(named(theirs.state_dict()))
        pixels = torch.randn(2, 3, side, side)
        expected = theirs(pixels).last_hidden_state
        torch.testing.assert_close(ours(pixels), expected, rtol=1e-4, atol=1e-4)


def test_windows_that_do_not_tile_are_named() -> None:
    with pytest.raises(BadInput, match="windows of 12 do not tile a map of 32 x 32 in stage 0"):
        Swin(SwinDims(128, 16, (2, 2), (2, 4), window=12))
