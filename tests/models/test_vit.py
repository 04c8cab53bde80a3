"""Our vision transformer is transformers' CLIP up to the tapped block."""

import dataclasses

import pytest
import torch
import transformers

from mllm_edge.models.blocks.vit import VisionEncoder, VitDims

DIMS = VitDims(image_size=28, patch_size=7, width=32, layers=4, heads=2, mlp_width=64)


def reference(dims: VitDims) -> transformers.CLIPVisionModel:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=dims.width,
        intermediate_size=dims.mlp_width,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        image_size=dims.image_size,
        patch_size=dims.patch_size,
        hidden_act=dims.activation,
        layer_norm_eps=dims.eps,
    )
    model = transformers.CLIPVisionModel(config).eval()
    for parameter in model.parameters():  # the default initialization leaves biases at zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("tap", [-1, -2, 2])
def test_same_features_as_transformers(activation: str, tap: int) -> None:
    dims = dataclasses.replace(DIMS, activation=activation, tap=tap)
    theirs = reference(dims)
    ours = VisionEncoder(dims).eval()
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: state[name] for name in ours.state_dict()})
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states[tap][:, 1:]
        assert torch.allclose(ours(pixels), expected, atol=1e-5)


def test_blocks_after_the_tap_are_not_there() -> None:
    assert DIMS.depth == 3
    assert not any(".layers.3." in name or "post_layernorm" in name for name in VisionEncoder(DIMS).state_dict())


def test_clip_l_336_has_576_patches() -> None:
    assert VitDims(336, 14, 1024, 24, 16, 4096).patches == 576
    assert VitDims(336, 14, 1024, 24, 16, 4096).depth == 23
