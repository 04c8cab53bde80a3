"""GILL's published files, written here with transformers' and diffusers' classes and, by hand, the authors' two."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tokenizers_to_test import gpt2_lists
from toy_gill import DIMS, START, spread
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel, OPTConfig, OPTForCausalLM

from mllm_edge.checkpoints.tokenizer import read_tokenizer
from mllm_edge.errors import BadInput
from mllm_edge.models.gill.heads import Heads
from mllm_edge.models.gill.layouts import load
from mllm_edge.models.gill.model import LM, TOKENS, Connector, tensor_shapes
from mllm_edge.models.gill.plan import plan

TABLE = f"{LM}model.decoder.embed_tokens.weight"
ARGS = {
    "opt_version": "facebook/opt-small",
    "visual_encoder": "openai/clip-small",
    "n_visual_tokens": 3,
    "ret_emb_dim": 6,
    "gen_emb_dim": 12,
    "text_emb_layers": [-1],
    "text_fc_mode": "gill_mapper",
    "ret_text_fc_mode": "linear",
    "num_tokens": 8,
    "num_clip_tokens": 5,
    "share_ret_gen": True,
    "retrieval_token_idx": list(range(START, START + 8)),
    "gen_token_idx": list(range(START, START + 8)),
}


def opt(folder: Path) -> dict[str, torch.Tensor]:
    """As the files of 6.7b: fp16, `decoder.` in front, padding behind the last token, lists as tokenizer."""
    config = OPTConfig(
        vocab_size=START + 6,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        word_embed_proj_dim=64,
    )
    model = OPTForCausalLM(config)
    spread(model, 1)
    state = {n: t.half() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    torch.save({n.removeprefix("model."): t for n, t in state.items()}, folder / "pytorch_model.bin")
    gpt2_lists(folder)
    return {f"{LM}{name}": tensor for name, tensor in state.items()}


def clip(folder: Path) -> dict[str, torch.Tensor]:
    """A whole CLIP's file, of which the vision half counts."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    model = CLIPVisionModel(config)
    spread(model, 2)
    state = {n.removeprefix("vision_model."): t for n, t in model.state_dict().items() if "position_ids" not in n}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vision_config": config.to_dict(), "model_type": "clip"}))
    others = {"logit_scale": torch.ones(()), "text_model.final_layer_norm.weight": torch.ones(4)}
    others["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save({**{f"vision_model.{n}": t for n, t in state.items()}, **others}, folder / "pytorch_model.bin")
    return {f"vision_encoder.{name}": tensor for name, tensor in state.items()}


def diffusion(folder: Path) -> dict[str, torch.Tensor]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    spread(unet, 3)
    spread(vae, 4)
    unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae", safe_serialization=False)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=20,
            hidden_size=12,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=5,
        )
    ).eval()
    spread(text, 5)
    text.save_pretrained(folder / "text_encoder")
    words = folder / "tokenizer"
    words.mkdir()
    (words / "vocab.json").write_text(json.dumps({"a": 0, "<|startoftext|>": 18, "<|endoftext|>": 19}))
    roles = {"bos_token": {"content": "<|startoftext|>"}, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (words / "tokenizer_config.json").write_text(json.dumps(roles))
    schedule = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    schedule.save_pretrained(folder / "scheduler")
    with torch.no_grad():
        empty = text(torch.tensor([[18, 19, 19, 19, 19]])).last_hidden_state
    decoder = {n: t for n, t in vae.state_dict().items() if n.startswith(("decoder.", "post_quant_conv."))}
    found = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    return {**found, **{f"vae_decoder.{name}": tensor for name, tensor in decoder.items()}, "empty_text": empty}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The authors' two files; the mapper inside is torch's own class."""
    torch.manual_seed(6)
    transformer = torch.nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, norm_first=True, batch_first=True)
    connector, heads = Connector(DIMS), Heads(DIMS.mapper, 64, 6, decides=True)
    rows, scale = torch.randn(8, 64).bfloat16(), torch.tensor(2.65625).bfloat16()
    mapper = {n: t for n, t in heads.mapper.state_dict().items() if not n.startswith("tfm.")}
    mapper |= {f"tfm.{name}": tensor for name, tensor in transformer.state_dict().items()}
    bridge = {n: t.bfloat16() for n, t in connector.state_dict().items()}
    mapper = {n: t.bfloat16() for n, t in mapper.items()}
    retrieval = {n: t.bfloat16() for n, t in heads.retrieval.state_dict().items()}
    file = {
        "input_embeddings.weight": rows,
        "logit_scale": scale,
        **bridge,
        **{f"ret_text_hidden_fcs.0.model.{name}": tensor for name, tensor in retrieval.items()},
        **{f"gen_text_hidden_fcs.0.{name}": tensor for name, tensor in mapper.items()},
    }
    torch.save({"state_dict": {f"model.{n}": t for n, t in file.items()}}, folder / "pretrained_ckpt.pth.tar")
    assert heads.decision is not None
    decision = {f"1.{name}": tensor for name, tensor in heads.decision.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": decision}, folder / "decision_model.pth.tar")
    (folder / "model_args.json").write_text(json.dumps(ARGS))
    return {
        "rows": rows,
        "logit_scale": scale,
        **{f"connector.{name}": tensor for name, tensor in bridge.items()},
        **{f"heads.retrieval.{name}": tensor for name, tensor in retrieval.items()},
        **{f"heads.mapper.{name}": tensor for name, tensor in mapper.items()},
        **{f"heads.decision.{name}": tensor for name, tensor in heads.decision.state_dict().items()},
    }


Published = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """The folder, with one base in it and the others beside it, and its tensors under our names."""
    home = tmp_path_factory.mktemp("published")
    folder = home / "gill_opt"
    folder.mkdir()
    state = {**trained(folder), **opt(home / "opt-small"), **clip(home / "clip-small")}
    state |= diffusion(folder / "stable-diffusion-v1-5")
    state[TABLE] = torch.cat([state[TABLE][:START].float(), state.pop("rows").float()])
    return folder, state


def copied(published: Published, tmp_path: Path) -> Path:
    shutil.copytree(published[0].parent, tmp_path / "copy")
    return tmp_path / "copy" / "gill_opt"


def test_every_tensor_is_found_in_its_place(published: Published) -> None:
    folder, state = published
    held = load(folder)
    assert held.dims == DIMS
    assert set(tensor_shapes(DIMS)) == set(state)
    for name, tensor in state.items():
        torch.testing.assert_close(held.tensors[name].float(), tensor.float(), rtol=0, atol=1e-6)
    lowered = plan(held)
    retrieved, drawn = lowered.answers
    assert retrieved.scale == pytest.approx(14.242, abs=0.01)  # type: ignore[union-attr]
    assert retrieved.decision == drawn.decision == "decision"  # type: ignore[union-attr]
    assert lowered.constants["empty_text"]().shape == (1, 5, 12)
    tokens = read_tokenizer(held.tokenizer)
    assert tokens.tokens[START - 1 :] == ["<|image|>", *TOKENS]
    assert tokens.types[START - 1 :] == [3, *[4] * 8] and tokens.add_bos
    assert not (folder.parent / "opt-small" / "tokenizer.json").exists()


def test_without_the_decision_both_kinds_of_pictures_are_made(published: Published, tmp_path: Path) -> None:
    folder = copied(published, tmp_path)
    (folder / "decision_model.pth.tar").unlink()
    held = load(folder)
    assert not held.dims.decides
    assert [entry.decision for entry in plan(held).answers] == ["", ""]  # type: ignore[union-attr]
    assert held.source["sha256"] != load(published[0]).source["sha256"]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("../opt-small", "opt-small is missing: the language model"),
        ("../clip-small", "clip-small is missing: CLIP"),
        ("stable-diffusion-v1-5", "stable-diffusion-v1-5 is missing: the diffusion model"),
        ("stable-diffusion-v1-5/unet", "unet is missing: a part of the diffusion model"),
        ("stable-diffusion-v1-5/vae", "vae is missing"),
        ("stable-diffusion-v1-5/text_encoder", "text_encoder is missing"),
        ("stable-diffusion-v1-5/tokenizer", "tokenizer is missing"),
    ],
)
def test_a_base_that_is_missing_is_named(published: Published, tmp_path: Path, base: str, message: str) -> None:
    folder = copied(published, tmp_path)
    shutil.rmtree(folder / base)
    with pytest.raises(BadInput, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_fc_mode": "linear"}, "has text_fc_mode 'linear', which is not supported"),
        ({"text_emb_layers": [-2]}, "text_emb_layers"),
        ({"num_tokens": 4}, "num_tokens"),
        ({"share_ret_gen": False}, "share_ret_gen"),
        ({"opt_version": 7}, "opt_version 7, which names no base"),
        ({"gen_token_idx": [1, 2]}, r"gen_token_idx \[1, 2\], the tokenizer"),
        ({"ret_emb_dim": 7}, "do not fit"),
        ({"n_visual_tokens": 4}, "do not fit"),
    ],
    ids=str,
)
def test_what_is_not_as_published_is_named(
    published: Published, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = copied(published, tmp_path)
    (folder / "model_args.json").write_text(json.dumps({**ARGS, **change}))
    with pytest.raises(BadInput, match=message):
        load(folder)


@pytest.mark.parametrize(
    "file", ["pretrained_ckpt.pth.tar", "decision_model.pth.tar", "../clip-small/pytorch_model.bin"]
)
def test_an_unknown_tensor_is_not_dropped(published: Published, tmp_path: Path, file: str) -> None:
    folder = copied(published, tmp_path)
    held = torch.load(folder / file, weights_only=True)
    held.get("state_dict", held)["model.third_head.weight"] = torch.ones(1)
    torch.save(held, folder / file)
    with pytest.raises(BadInput, match=r"third_head\.weight"):
        load(folder)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_a_pickle_that_runs_code_is_refused(published: Published, tmp_path: Path) -> None:
    folder = copied(published, tmp_path)
    torch.save({"state_dict": {"a": Payload()}}, folder / "decision_model.pth.tar")
    with pytest.raises(BadInput, match="wants to run code"):
        load(folder)


def test_rows_of_a_whole_table_and_another_schedule_are_refused(published: Published, tmp_path: Path) -> None:
    folder = copied(published, tmp_path)
    scheduler = folder / "stable-diffusion-v1-5" / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    with pytest.raises(BadInput, match="prediction_type 'v_prediction'"):
        load(folder)
    held = torch.load(folder / "pretrained_ckpt.pth.tar", weights_only=True)
    held["state_dict"]["model.input_embeddings.weight"] = torch.ones(START + 8, 64)
    torch.save(held, folder / "pretrained_ckpt.pth.tar")
    with pytest.raises(BadInput, match="8 x 64 and 385 rows or more are needed"):
        load(folder)
