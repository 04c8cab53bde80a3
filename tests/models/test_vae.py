"""The autoencoder's halves against diffusers' class on the same random weights, and their graphs against themselves."""

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
from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims, VaeEncoder, vae_dims, vae_name
from mllm_edge.models.parts import filled
from mllm_edge.models.plan import StageExport

CONFIG = Path("vae") / "config.json"
SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
SD15: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
THREE = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "two levels": ({}, (16, 16)),
    "one level": (
        {
            "block_out_channels": [8],
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
        },
        (6, 5),
    ),
    "three levels, two layers": ({**THREE, "block_out_channels": [8, 8, 16], "layers_per_block": 2}, (16, 24)),
    "other channels": ({"latent_channels": 3, "in_channels": 1, "out_channels": 1}, (8, 8)),
    "odd sides": ({**THREE, "block_out_channels": [4, 8, 8]}, (17, 22)),
}


def trio(change: dict[str, Any]) -> tuple[VaeEncoder, VaeDecoder, Any]:
    """Our halves and diffusers' whole with the same weights."""
    config = {**SMALL, **change}
    theirs = diffusers.AutoencoderKL.from_config(config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    dims, weights = vae_dims(config, CONFIG), theirs.state_dict()
    encoder, decoder = filled(VaeEncoder(dims), weights), filled(VaeDecoder(dims), weights)
    assert isinstance(encoder, VaeEncoder) and isinstance(decoder, VaeDecoder)
    return encoder, decoder, theirs


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_latents_and_pictures_are_those_of_diffusers(name: str) -> None:
    change, (high, wide) = SHAPES[name]
    encoder, decoder, theirs = trio(change)
    pixels = torch.randn(2, theirs.config.in_channels, high, wide)
    expected = theirs.encode(pixels).latent_dist
    mean, spread = encoder.distribution(pixels)
    torch.testing.assert_close(mean, expected.mode(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(spread, expected.logvar, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encoder(pixels), mean)
    drawn = decoder(mean)
    torch.testing.assert_close(drawn, theirs.decode(mean).sample, rtol=1e-4, atol=1e-4)


def test_names_and_shapes_at_full_size_are_those_of_diffusers() -> None:
    dims = vae_dims(SD15, CONFIG)
    assert dims == VaeDims()
    assert dims.shrinks == 8
    with torch.device("meta"):
        halves, theirs = (VaeEncoder(dims), VaeDecoder(dims)), diffusers.AutoencoderKL.from_config(SD15)
    found = [{name: t.shape for name, t in half.state_dict().items()} for half in halves]
    assert found[0] | found[1] == {name: t.shape for name, t in theirs.state_dict().items()}
    assert not found[0].keys() & found[1].keys()


def test_older_files_name_the_attention_otherwise() -> None:
    with torch.device("meta"):
        now = [*VaeEncoder(VaeDims()).state_dict(), *VaeDecoder(VaeDims()).state_dict()]
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    then = now
    for new, old in older.items():
        then = [name.replace(f".{new}.", f".{old}.") for name in then]
    assert sum(a != b for a, b in zip(now, then, strict=True)) == 16
    assert [vae_name(name) for name in then] == now
    assert [vae_name(name) for name in now] == now


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_both_graphs_give_the_same(tmp_path: Path, precision: str) -> None:
    encoder, decoder, _ = trio({})
    pixels, latent = TensorSpec("pixels", "float32", [1, 3, 16, 16]), TensorSpec("latent", "float32", [1, 4, 8, 8])
    for module, given, found in ((encoder, pixels, latent), (decoder, latent, pixels)):
        path = tmp_path / f"{given.name}.onnx"
        export_stage(StageExport("vae", lambda module=module: module, [given], [found]), path, precision)  # type: ignore[misc]
        read = torch.randn([int(size) for size in given.shape])
        with torch.no_grad():
            expected = module(read).numpy()
        (made,) = onnxruntime.InferenceSession(path).run(None, {given.name: read.numpy()})
        limit = 1e-4 if precision == "fp32" else 1e-2 * float(np.abs(expected).max())
        np.testing.assert_allclose(made, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift_factor": 0.1}, "shift_factor 0.1, which is not supported"),
        ({"use_quant_conv": False}, "use_quant_conv False, which is not supported"),
        ({"out_channels": 4}, "out_channels 4, which is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]}, "'AttnDownEncoderBlock2D', which is"),
        ({"block_out_channels": [8, 10]}, "width 10, which 4 groups do not divide"),
        ({"scaling_factor": -1}, "scaling_factor -1, which is no positive number"),
    ],
)
def test_what_is_not_built_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        vae_dims({**SMALL, **change}, CONFIG)
