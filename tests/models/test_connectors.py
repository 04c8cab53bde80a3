"""Connectors whose number of rows is chosen: against transformers' classes and torch's own, lowered, and trained."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from mllm_edge.bundle.manifest import TensorSpec
from mllm_edge.errors import BadInput
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.models.blocks.connectors import RESAMPLERS, connector, image_tokens
from mllm_edge.models.blocks.resamplers import CAbstractor, Perceiver, pooling
from mllm_edge.models.llava.layouts import load
from mllm_edge.models.plan import StageExport
from mllm_edge.recipes import train


def test_the_perceiver_is_transformers() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(
        perceiver_config=SimpleNamespace(qk_layer_norms_perceiver=False), vision_config=SimpleNamespace(embed_dim=24)
    )
    theirs = IdeficsPerceiverResampler(config, 24, 2, 3, 8, 5).eval()
    ours, state = Perceiver(24, 5, layers=2, heads=3).eval(), {}
    names = {
        "0.context_layer_norm": "features_norm",
        "0.latents_layer_norm": "rows_norm",
        "0.q_proj": "q",
        "0.k_proj": "k",
        "0.v_proj": "v",
        "0.output_proj": "o",
        "1.ln": "feed.0",
        "1.fc": "feed.1",
        "1.c_proj": "feed.3",
    }
    for name, tensor in theirs.state_dict().items():
        for their, our in names.items():
            name = name.replace(f".{their}.", f".{our}.")
        state[name.replace("blocks.", "layers.").replace("layer_norm.", "norm.")] = torch.randn_like(tensor) * 0.3
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    ours.load_state_dict(state)
    features = torch.randn(2, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours(features), theirs(features), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cells", "means"), [(8, 4), (8, 3), (7, 5), (5, 1), (6, 6)])
def test_pooling_is_torchs_adaptive_average(cells: int, means: int) -> None:
    x, matrix = torch.randn(2, 3, cells, cells), pooling(cells, means)
    expected = torch.nn.AdaptiveAvgPool2d(means)(x)
    torch.testing.assert_close(matrix @ x @ matrix.T, expected, rtol=1e-5, atol=1e-5)


def test_the_abstractor_keeps_what_lies_side_by_side() -> None:
    """A change in one corner of the picture moves the rows of that corner most."""
    torch.manual_seed(0)
    module = CAbstractor(64, 16, 16, depth=1).eval()
    features = torch.randn(1, 64, 16)
    changed = features.clone()
    changed[0, 63] += 3.0  # bottom right
    with torch.no_grad():
        moved = (module(changed) - module(features)).abs().sum(-1)[0]
    assert moved.shape == (16,) and int(moved.argmax()) == 15 and moved[15] > 5 * moved[0]


@pytest.mark.parametrize("kind", RESAMPLERS)
def test_each_kind_lowered(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = connector(kind, 32, 24, 36, tokens=9).eval()
    specs = [TensorSpec("x", "float32", [1, 36, 32])], [TensorSpec("y", "float32", [1, 9, 24])]
    features = torch.randn(1, 36, 32)
    with torch.no_grad():
        expected = module(features).numpy()
    for precision, limit in (("fp32", 1e-5), ("fp16", 5e-3)):
        path = tmp_path / f"{precision}.onnx"
        export_stage(StageExport("connector", lambda: module, *specs), path, precision, [{"x": features.numpy()}])
        (found,) = onnxruntime.InferenceSession(str(path)).run(None, {"x": features.numpy()})
        np.testing.assert_allclose(found, expected, rtol=limit, atol=limit * np.abs(expected).max())


def test_rows_and_refusals() -> None:
    assert image_tokens("perceiver", 64, 1, 16) == 16 and image_tokens("linear", 64, 2, 0) == 16
    for given, part in (
        (("perceiver", 32, 24, 36), "needs tokens, 1 to 36"),
        (("qformer", 32, 24, 36, 1, 37), "got 37"),
        (("cabstractor", 32, 24, 36, 1, 8), "gives squares of tokens"),
        (("perceiver", 200, 24, 36, 1, 4), "multiple of 64"),
        (("mlp2x_gelu", 32, 24, 36, 1, 4), "leave out tokens"),
        (("resampler", 32, 24, 36), "use linear, mlp2x_gelu, qformer, perceiver, cabstractor"),
    ):
        with pytest.raises(BadInput, match=part):
            connector(*given)  # type: ignore[arg-type]


def test_recipes_train_any_of_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["init.llava=tiny", "steps=2", "batch=2", "evaluate=2", "save_every=2", "precision=fp32", "data.wide=0"]
    more += ["init.vision_encoder=", "connector=perceiver", "tokens=16", f"out={run}"]
    train("llava-wide", more, False, lambda *_: None)
    held = load(run / "checkpoint")
    assert (held.dims.connector, held.dims.tokens, held.dims.image_tokens) == ("perceiver", 16, 16)
    assert held.tensors["connector.0.latents"].shape == (16, 192)
    again = [*more[:-1], "steps=1", f"out={tmp_path / 'again'}", f"init.connector={run}"]
    with pytest.raises(BadInput, match=r"init\.connector is no cabstractor of this size"):
        train("llava-wide", [*again, "connector=cabstractor"], False, lambda *_: None)
    with pytest.raises(BadInput, match="tokens changes nothing in the task encoder"):
        train("encoder-wide", ["tokens=4", f"out={tmp_path / 'other'}"], False, lambda *_: None)
