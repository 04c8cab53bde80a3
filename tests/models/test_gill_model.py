"""GILL's parts against torch's and transformers' own classes, its counts, and our own layout."""

import json
import math
from pathlib import Path

import pytest
import torch
import toy_gill
from toy_gill import DIMS, START, spread
from transformers import CLIPVisionConfig, CLIPVisionModel

from mllm_edge.errors import BadInput
from mllm_edge.models.gill.heads import Mapper, MapperDims
from mllm_edge.models.gill.layouts import load
from mllm_edge.models.gill.model import CONFIGS, LM, PooledEncoder, tensor_shapes
from mllm_edge.models.gill.plan import build, plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_gill.checkpoint(tmp_path_factory.mktemp("gill") / "checkpoint")


@torch.no_grad()
def test_the_mapper_is_torchs_transformer() -> None:
    dims = MapperDims(width=24, layers=3, heads=4, mlp_width=40, queries=7, out_width=10)
    ours = Mapper(dims, in_width=18).eval()
    spread(ours, 4)
    theirs = torch.nn.Transformer(24, 4, 3, 3, 40, dropout=0.0, norm_first=True, batch_first=True).eval()
    theirs.load_state_dict(ours.tfm.state_dict())
    states, embeds = torch.randn(2, 8, 18), torch.randn(2, 8, 18)
    read = torch.nn.functional.linear(states + embeds, ours.fc.weight, ours.fc.bias)
    rows = theirs(read, ours.query_embs.repeat(2, 1, 1))
    expected = torch.nn.functional.linear(rows, ours.model.weight, ours.model.bias)
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(states, embeds), expected, rtol=1e-4, atol=1e-5)


def test_the_published_mapper_has_the_papers_count() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Mapper(MapperDims(), 4096).parameters()) == 31_958_784


@torch.no_grad()
def test_the_pooled_vector_is_transformers_pooler_output() -> None:
    vision = DIMS.vision
    config = CLIPVisionConfig(
        hidden_size=vision.width,
        intermediate_size=vision.mlp_width,
        num_hidden_layers=vision.layers,
        num_attention_heads=vision.heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act="quick_gelu",
    )
    theirs, ours = CLIPVisionModel(config).eval(), PooledEncoder(vision).eval()
    spread(theirs, 5)
    known = {n.removeprefix("vision_model."): t for n, t in theirs.state_dict().items() if "position_ids" not in n}
    ours.load_state_dict(known)
    pixels = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(ours(pixels), theirs(pixels).pooler_output, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_retrieval_and_decision_read_the_first_state_and_the_decision_is_turned_round() -> None:
    heads = DIMS.heads().eval()
    spread(heads, 6)
    states, embeds = torch.randn(1, 8, 64), torch.randn(1, 8, 64)
    _, query, decision = heads(states, embeds)
    torch.testing.assert_close(query, states[:, 0] @ heads.retrieval.weight.T + heads.retrieval.bias)
    generate, retrieve = (states[0, 0] @ heads.decision.weight.T + heads.decision.bias).tolist()
    assert decision[0].tolist() == pytest.approx([retrieve, generate], abs=1e-5)


def test_sizes_of_the_configs() -> None:
    sizes = {}
    for name, dims in CONFIGS.items():
        shapes = tensor_shapes(dims)
        sizes[name] = sum(math.prod(shape) for shape in shapes.values())
        assert dims.unet.side * dims.vae.shrinks == dims.vae.side
        if name == "6.7b":
            trained = [n for n in shapes if n.startswith(("connector.", "heads.mapper", "heads.retrieval"))]
            rows = 8 * dims.language.width
            assert sum(math.prod(shapes[n]) for n in trained) + rows + 1 == 50_096_385  # as the authors' file
            assert shapes[f"{LM}model.decoder.embed_tokens.weight"] == (50274, 4096)
    assert 2 * sizes["tiny"] < 25e6
    assert 7.9e9 < sizes["6.7b"] < 8.0e9


def test_our_layout_comes_back_as_it_was_written(folder: Path) -> None:
    held, weights = load(folder), toy_gill.state()
    assert held.dims == DIMS and held.config == "micro"
    assert set(held.tensors) == set(weights)
    assert all(torch.equal(held.tensors[name], tensor) for name, tensor in weights.items())
    built = build(held)
    assert torch.equal(built.language_model.lm_head.weight, weights[f"{LM}model.decoder.embed_tokens.weight"])
    lowered = plan(held)
    assert [stage.name for stage in lowered.stages] == ["vision_encoder", "connector", "heads", "unet", "vae_decoder"]
    assert lowered.picture_tokens == DIMS.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": "llava"}, "holds no GILL"),
        ({"vision": {"tap": -2}}, "taps CLIP at layer 1 of 2"),
        ({"unet": {"text_width": 13}}, "gives rows of 12, the UNet reads 13"),
        ({"vae": {"latent_channels": 5}}, "have 4 and 5 channels"),
        ({"mapper": {"heads": 5}}, "a mapper or a vocabulary that cannot be"),
        ({"mapper": {"width": 1 << 30}}, "which no model has"),
        ({"unet": {"attends": "yes"}}, "attends"),
        ({"rows": "three"}, "of a wrong type"),
        ({"speed": 3}, "does not describe gill's dims"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        if isinstance(value, dict):
            config["dims"][key] |= value
        elif key == "system":
            config[key] = value
        else:
            config["dims"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(BadInput, match=message):
        load(tmp_path)


def test_a_tokenizer_without_the_picture_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace("[IMG0]", "[PIC]"), encoding="utf-8")
    with pytest.raises(BadInput, match=rf"\[PIC\].* from {START} on, not \[IMG0\]"):
        plan(load(tmp_path))
