"""The UNet against diffusers' class on the same random weights, and its graph against itself."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.errors import BadInput
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.models.blocks import unet
from mllm_edge.models.blocks.unet import FLOAT32, UNet, UNetDims, unet_dims
from mllm_edge.models.plan import StageExport

CONFIG = Path("unet") / "config.json"
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
# As published, with the fields that its time had.
SD15: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
THREE = {"block_out_channels": [8, 8, 16], "down_block_types": ["CrossAttnDownBlock2D"] * 3}
PLAIN = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "as Stable Diffusion": ({}, (8, 8)),
    "one head": ({"attention_head_dim": 1}, (8, 8)),
    "heads by level": ({"attention_head_dim": [4, 2]}, (8, 8)),
    "text in the middle alone": (PLAIN, (8, 8)),
    "text in all of three levels": ({**THREE, "up_block_types": ["CrossAttnUpBlock2D"] * 3}, (8, 12)),
    "two layers, eight channels": ({"layers_per_block": 2, "in_channels": 8}, (6, 8)),
    "odd sides": ({**THREE, "up_block_types": ["CrossAttnUpBlock2D"] * 3}, (7, 9)),
    "one level": (
        {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]},
        (5, 3),
    ),
}


def pair(change: dict[str, Any]) -> tuple[UNet, Any]:
    """Ours and diffusers' with the same weights."""
    config = {**SMALL, **change}
    theirs = diffusers.UNet2DConditionModel.from_config(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    ours = UNet(unet_dims(config, CONFIG)).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_noise_is_that_of_diffusers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, (high, wide) = SHAPES[name]
    ours, theirs = pair(change)
    latent, text = torch.randn(2, ours.conv_in.in_channels, high, wide), torch.randn(2, 5, 12)
    expected = theirs(latent, torch.tensor([981.0, 10.09]), text).sample
    torch.testing.assert_close(ours(latent, torch.tensor([981.0, 10.09]), text), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(unet, "SCORES", 1)  # head by head
    torch.testing.assert_close(ours(latent, torch.tensor([981.0, 10.09]), text), expected, rtol=1e-4, atol=1e-4)
    one = theirs(latent, 333, text).sample
    torch.testing.assert_close(ours(latent, torch.tensor([333.0]), text), one, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_residual_is_as_if_the_first_convolution_gave_it() -> None:
    ours, theirs = pair({"in_channels": 8})
    latent, text, residual = torch.randn(3, 8, 8, 8), torch.randn(3, 5, 12), torch.randn(1, 8, 8, 8)
    theirs.conv_in.register_forward_hook(lambda _module, _given, found: found + residual)
    expected = theirs(latent, 600, text).sample
    torch.testing.assert_close(ours(latent, torch.tensor([600.0]), text, residual), expected, rtol=1e-4, atol=1e-4)


def test_names_and_shapes_at_full_size_are_those_of_diffusers() -> None:
    dims = unet_dims(SD15, CONFIG)
    assert dims == UNetDims()
    with torch.device("meta"):
        ours, theirs = UNet(dims), diffusers.UNet2DConditionModel.from_config(SD15)
    found, wanted = ({name: t.shape for name, t in module.state_dict().items()} for module in (ours, theirs))
    assert found == wanted
    assert len(found) == 686  # as SmartEdit's release has it
    assert sum(parameter.numel() for parameter in ours.parameters()) == 859_520_964


def stage(ours: UNet, side: int, residual: bool) -> StageExport:
    channels, width = ours.conv_in.in_channels, ours.conv_in.out_channels
    inputs = [
        TensorSpec("latent", "float32", ["branches", channels, side, side]),
        TensorSpec("timestep", "float32", [1]),
        TensorSpec("text", "float32", ["branches", 5, 12]),
        TensorSpec("beside", "float32", [1, width, side, side]),
    ]
    outputs = [TensorSpec("noise", "float32", ["branches", 4, side, side])]
    return StageExport("unet", lambda: ours, inputs if residual else inputs[:3], outputs, float32=FLOAT32)


@pytest.mark.parametrize(("residual", "precision"), [(False, "fp32"), (True, "fp32"), (False, "fp16")])
def test_the_graph_gives_the_same_for_any_number_of_branches(tmp_path: Path, residual: bool, precision: str) -> None:
    ours, _ = pair({"in_channels": 8} if residual else {})
    export_stage(stage(ours, 8, residual), tmp_path / "unet.onnx", precision)
    session = onnxruntime.InferenceSession(tmp_path / "unet.onnx")
    for branches in (1, 2, 3):
        latent, text = torch.randn(branches, ours.conv_in.in_channels, 8, 8), torch.randn(branches, 5, 12)
        given = [latent, torch.tensor([981.0]), text, *([torch.randn(1, 8, 8, 8)] if residual else [])]
        feed = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), given, strict=True)}
        with torch.no_grad():
            expected = ours(*given).numpy()
        limit = 1e-4 if precision == "fp32" else 1e-2 * float(np.abs(expected).max())
        np.testing.assert_allclose(session.run(None, feed)[0], expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_linear_projection": True}, "use_linear_projection True, which is not supported"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type 'UNetMidBlock2D', which is not supported"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types 'AttnDownBlock2D', which is not"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "levels that read the text on one way only"),
        ({"up_block_types": ["UpBlock2D"]}, "no list of 2"),
        ({"block_out_channels": [8, 18]}, "width 18, which its groups or heads do not divide"),
        ({"block_out_channels": [8, "16"]}, "block_out_channels '16', which is no count"),
        ({"block_out_channels": []}, "0 numbers as block_out_channels"),
        ({"attention_head_dim": [2, 2, 2]}, "3 numbers as attention_head_dim, not 2"),
        ({"layers_per_block": [1, 1]}, r"layers_per_block \[1, 1\], which is no count"),
        ({"cross_attention_dim": None}, "lacks cross_attention_dim"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time', which is not supported"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        unet_dims({**SMALL, **change}, CONFIG)
