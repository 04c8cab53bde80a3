"""GLaMM's parts put together: taps, layouts, and what a checkpoint must bring."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.region import RegionDims
from mllm_edge.models.blocks.sam import SamDims
from mllm_edge.models.blocks.sam_decoder import MaskDecoderDims
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.glamm import plan as glamm_plan
from mllm_edge.models.glamm.layouts import load, read_sam, save_glamm
from mllm_edge.models.glamm.model import ADDED, CONFIGS, Glamm, GlammDims, TappedEncoder, grounding, tensor_shapes
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.llava.model import LlavaDims
from mllm_edge.models.resolve import resolve, shipped

VISION = VitDims(image_size=28, patch_size=7, width=16, layers=11, heads=2, mlp_width=24)
LANGUAGE = LlamaDims(768, 32, 48, layers=1, heads=4, kv_heads=2, context=128)
SMALL = GlammDims(
    grounding(LlavaDims(VISION, LANGUAGE)),
    taps=(1, 4, 7, 10),
    mask_encoder=SamDims(64, 16, 24, 2, 2, 32, window=3, global_layers=(1,), out_width=16),
    mask_decoder=MaskDecoderDims(grid=4, width=16, heads=8, mlp_width=24),
    region=RegionDims(64, 20, 8, groups=64, rounds=2, bins=2),
)


@pytest.fixture(scope="module")
def model() -> Glamm:
    torch.manual_seed(0)
    return Glamm(SMALL).eval()


def test_paper_sized_dims_have_the_papers_shapes() -> None:
    shapes = tensor_shapes(CONFIGS["7b"])
    assert shapes["language_model.model.embed_tokens.weight"] == (32007, 4096)
    assert shapes["region_encoder.roi_align.flatten_linear.weight"] == (1024, 200704)
    assert shapes["region_encoder.mlvl_fuse.input_conv.3.weight"] == (1024, 1026, 1, 1)
    assert shapes["mask_head.projection.2.weight"] == (256, 4096)
    assert shapes["mask_encoder.blocks.0.attn.rel_pos_h"] == (27, 80)
    assert shapes["mask_encoder.blocks.7.attn.rel_pos_h"] == (127, 80)
    assert tensor_shapes(CONFIGS["7b-lite"])["mask_encoder.blocks.0.attn.qkv.weight"] == (2304, 768)
    assert CONFIGS["7b"].added_id("<bbox>") == 32002
    assert CONFIGS["7b"].added_id("[SEG]") == 32004


def test_the_shipped_checkpoint_stays_under_12_mb() -> None:
    files = [file for file in (shipped("glamm") / "tiny").rglob("*") if file.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.model", "added_tokens.json"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= 12_000_000


def test_taps_are_hidden_states_of_transformers_clip() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=11, num_attention_heads=2, image_size=28, patch_size=7
    )
    theirs = CLIPVisionModel(config).eval()
    ours = TappedEncoder(VISION, SMALL.taps)
    names = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: names[name] for name in ours.state_dict()})
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        features, levels = ours(pixels)
        hidden = theirs(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features, hidden[-2][:, 1:], atol=1e-4, rtol=1e-4)
    for level, tap in zip(levels.unbind(1), (1, 4, 7, 10), strict=True):  # hidden_states[-2::-3], reversed
        torch.testing.assert_close(level, hidden[tap][:, 1:], atol=1e-4, rtol=1e-4)


def published(model: Glamm, folder: Path) -> Path:
    """The weights as `MBZUAI/GLaMM-*` has them: no CLIP, all of SAM, and what GLaMM does not use of it."""
    folder.mkdir()
    state, clip = {}, {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "vision_encoder":
            clip[f"vision_model.{rest}"] = tensor
            continue
        rest = rest.replace("mask_decoder.", "model.grounding_encoder.mask_decoder.")
        rest = rest.replace("prompt_encoder.", "model.grounding_encoder.prompt_encoder.")
        rest = rest.replace("projection.", "model.text_hidden_fcs.0.")
        new = {
            "connector": f"model.mm_projector.{rest}",
            "region_encoder": f"model.region_encoder.{rest}",
            "mask_encoder": f"model.grounding_encoder.image_encoder.{rest}",
            "mask_head": rest,
            "language_model": rest,
        }[part]
        state[new] = tensor
    for unused in ("prompt_encoder.mask_downscaling.0.weight", "mask_decoder.iou_prediction_head.layers.0.weight"):
        state[f"model.grounding_encoder.{unused}"] = torch.ones(2, 2)
    state["model.grounding_encoder.mask_decoder.output_hypernetworks_mlps.1.layers.0.weight"] = torch.ones(2, 2)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "clip").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in clip.items()}, folder / "clip" / "model.safetensors")
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 11, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    (folder / "clip" / "config.json").write_text(json.dumps({"vision_config": vision}))
    config = {
        "model_type": "llava", "vision_tower": "clip", "mm_use_im_start_end": True, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.model", "added_tokens.json"):
        (folder / file).write_bytes((shipped("glamm") / "tiny" / file).read_bytes())
    return folder


def same(checkpoint, model: Glamm, atol: float = 0.0) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(checkpoint.tensors[name].float(), tensor, atol=atol, rtol=0)


def test_the_published_layout(model: Glamm, tmp_path: Path) -> None:
    checkpoint = load(published(model, tmp_path / "GLaMM-Small"))
    assert checkpoint.dims == SMALL
    same(checkpoint, model)
    assert [stage.name for stage in glamm_plan.plan(checkpoint).stages] == [
        "vision_encoder", "connector", "region_encoder", "mask_encoder", "mask_decoder",
    ]  # fmt: skip


def test_our_layout(model: Glamm, tmp_path: Path) -> None:
    tokenizer = shipped("glamm") / "tiny"
    save_glamm(tmp_path / "saved", "small", SMALL, model.state_dict(), tokenizer, torch.float32)
    checkpoint = load(tmp_path / "saved")
    assert (checkpoint.dims, checkpoint.config) == (SMALL, "small")
    same(checkpoint, model)
    assert json.loads((tmp_path / "saved" / "added_tokens.json").read_text())["[SEG]"] == 768 + ADDED.index("[SEG]")


def test_sam_alone_in_its_own_layout(model: Glamm, tmp_path: Path) -> None:
    state = {f"image_encoder.{name}": tensor for name, tensor in model.mask_encoder.state_dict().items()}
    state |= {
        name: tensor for name, tensor in model.mask_head.state_dict().items() if not name.startswith("projection")
    }
    state["mask_decoder.iou_prediction_head.layers.0.weight"] = torch.ones(1)
    torch.save(state, tmp_path / "sam_vit_h.pth")
    read = read_sam(tmp_path / "sam_vit_h.pth")
    wanted = {name for name in model.state_dict() if name.startswith("mask_") and ".projection." not in name}
    assert set(read) == wanted
    torch.testing.assert_close(read["mask_encoder.neck.0.weight"], model.mask_encoder.neck[0].weight.detach())


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_a_sam_file_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"image_encoder.x": Evil()}, tmp_path / "sam.pth")
    with pytest.raises(BadInput, match="refused: it wants to run code"):
        read_sam(tmp_path / "sam.pth")
    assert capsys.readouterr().out == ""


def test_what_is_not_glamm(model: Glamm, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"sam\.safetensors is missing; run the recipe sam-pretrain"):
        read_sam(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BadInput, match="holds no SAM"):
        read_sam(tmp_path / "other.safetensors")
    folder = published(model, tmp_path / "plain")
    kept = {n: t for n, t in load_all(folder).items() if "grounding_encoder" not in n}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(BadInput, match="without a grounding encoder"):
        load(folder)

    with pytest.raises(BadInput, match="holds weights of llava, not of glamm"):
        load(shipped("llava") / "tiny")


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_tokenizer_without_glamms_tokens(model: Glamm, tmp_path: Path) -> None:
    folder = published(model, tmp_path / "old")
    (folder / "added_tokens.json").unlink()
    with pytest.raises(BadInput, match="has no token <im_start>"):
        glamm_plan.plan(load(folder))


@pytest.mark.parametrize(
    ("weights", "config"), [("random", "8b"), ("", "7b"), ("tiny", "7b"), ("no/such/folder", None)]
)
def test_weights_that_cannot_be_found(weights: str, config: str | None) -> None:
    with pytest.raises(BadInput):
        resolve("glamm", weights, config)


def test_random_weights_of_any_config_are_lazy() -> None:
    checkpoint = resolve("glamm", "random", "7b-lite")
    assert dataclasses.replace(checkpoint.dims) == CONFIGS["7b-lite"]
    assert checkpoint.tensors["mask_head.projection.2.bias"].shape == (256,)
