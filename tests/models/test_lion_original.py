"""LION's published files, written here from a small random LION under the original's names."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from toys import letters

from mllm_edge.errors import BadInput
from mllm_edge.models.blocks.eva import EvaDims
from mllm_edge.models.blocks.qformer import QFormerDims
from mllm_edge.models.blocks.swin import SwinDims
from mllm_edge.models.language.t5 import T5Dims
from mllm_edge.models.lion.layouts import load
from mllm_edge.models.lion.model import Lion, LionDims, Tagger, TaggerDims
from mllm_edge.models.lion.plan import plan

WORDS = {"<extra_id_0>": 33, "[CLS]": 34, "[SEP]": 35}
DIMS = LionDims(
    EvaDims(28, 14, 88, 1, 16, (38, 28, 18)),
    QFormerDims(64, 2, 1, 32, queries=3, read_width=88, vocabulary=36, positions=16),
    T5Dims(36, 32, 48, 2, 2, 8, activation="gelu", bottleneck=4),
    aggregator_heads=1,
    aggregator_mlp=24,
    tagger=TaggerDims(SwinDims(32, 8, (1, 1), (2, 2), window=4), 4, 12, 16, 4, 24, 2),
)
PUBLISHED = (
    (r"queries\.qformer\.query_tokens", "query_tokens"),
    (r"queries\.qformer\.", "Qformer.bert."),
    (r"queries\.norm\.", "ln_vision."),
    (r"queries\.proj\.", "t5_proj."),
    (r"aggregator\.blocks\.", "fusion_adapter.blocks."),
    (r"aggregator\.norm\.", "ln_adapter."),
    (r"aggregator\.proj\.", "adapter_proj."),
    (r"soft_prompt", "soft_prompt_hint"),
    (r"language_model\.", "t5_model."),
)
EVA = (
    (r"patch_embedding\.", "patch_embed.proj."),
    (r"layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
    (r"layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
    (r"layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
)


def original(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    return next(re.sub(f"^{rule}", name_there, name) for rule, name_there in rules if re.match(rule, name))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    lion, tagger = Lion(DIMS), Tagger(DIMS.tagger)
    with torch.no_grad():
        for name, parameter in lion.named_parameters():
            parameter.normal_()
            if name.endswith("self_attn.k_proj.bias"):
                parameter.zero_()  # EVA has none
    state = lion.state_dict()
    seen = {n.removeprefix("vision_encoder."): t for n, t in state.items() if n.startswith("vision_encoder.")}
    eva = {"cls_token": seen.pop("class_embedding").reshape(1, 1, -1), "norm.weight": torch.ones(3)}
    eva["pos_embed"] = seen.pop("position_embedding.weight")[None]
    for block in range(39):
        parts = [
            seen.pop(f"layers.{block}.self_attn.{part}_proj.{kind}") for part in "qkv" for kind in ("weight", "bias")
        ]
        eva[f"blocks.{block}.attn.qkv.weight"] = torch.cat(parts[::2])
        eva[f"blocks.{block}.attn.q_bias"], eva[f"blocks.{block}.attn.v_bias"] = parts[1], parts[5]
    eva |= {original(name, EVA): tensor for name, tensor in seen.items()}
    eva |= {name.replace("blocks.3.", "blocks.39."): t for name, t in eva.items() if name.startswith("blocks.3.")}
    torch.save(eva, folder / "eva_vit_g.pth")
    trained, base = {}, {}
    for name, tensor in state.items():
        if name.startswith("language_model.") and ".adapter." not in name:
            base[name.removeprefix("language_model.")] = tensor
        elif not name.startswith("vision_encoder."):
            trained[original(name, PUBLISHED)] = tensor
    trained["Qformer.bert.embeddings.position_ids"] = torch.arange(16)[None]
    torch.save({"model": trained, "optimizer": {}, "epoch": 3}, folder / "LION-FlanT5-XL.pth")
    t5 = letters(folder / "flan-t5-xl", WORDS)
    torch.save({**base, "encoder.embed_tokens.weight": base["shared.weight"]}, t5 / "pytorch_model.bin")
    config = {"vocab_size": 36, "d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    config |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "model_type": "t5"}
    (t5 / "config.json").write_text(json.dumps(config))
    letters(folder / "bert-base-uncased", WORDS)
    ram = {
        (f"vision_multi.encoder.layer.{n.removeprefix('layers.')}" if n.startswith("layers.") else n): t
        for n, t in tagger.state_dict().items()
    }
    ram |= {
        "visual_encoder.layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
        "text_decoder.x": torch.ones(1),
    }
    torch.save({"model": ram}, folder / "ram_swin_large_14m.pth")
    (folder / "ram_tag_list.txt").write_text("red\nblue\na ring\nround\n")
    (folder / "ram_tag_list_threshold.txt").write_text("0.65\n0.8\n1.0\n0.5\n")
    return folder, {**state, **{f"tagger.{name}": tensor for name, tensor in tagger.state_dict().items()}}


def test_every_tensor_is_found_in_its_place(published: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, state = published
    held = load(folder)
    assert held.dims == DIMS
    assert state.keys() <= set(held.tensors)
    for name, tensor in state.items():
        assert torch.equal(held.tensors[name], tensor), name
    lowered = plan(held)
    tags = next(source for source in lowered.sources if source.kind == "labels")
    assert (tags.names, tags.thresholds) == (["red", "blue", "a ring", "round"], [0.65, 0.8, 1.0, 0.5])
    assert lowered.constants["soft_prompt"]().shape == (1, 32)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("eva_vit_g.pth", "eva_vit_g.pth is missing: EVA's weights"),
        ("flan-t5-xl", "no flan-t5-xl or flan-t5-xxl"),
        ("bert-base-uncased", "bert-base-uncased is missing: the Q-Former's tokenizer"),
        ("ram_tag_list.txt", "ram_tag_list.txt is missing"),
    ],
)
def test_a_base_that_is_missing_is_named(
    published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, file: str, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published[0], folder)
    shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()
    with pytest.raises(BadInput, match=message):
        plan(load(folder))


def test_without_the_tagger_there_are_no_tags(published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published[0], folder)
    (folder / "ram_swin_large_14m.pth").unlink()
    held = load(folder)
    assert held.dims.tagger is None
    assert "{tags}" not in plan(held).prompt.first


def test_an_unknown_tensor_is_not_dropped(published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(published[0], folder)
    file = folder / "LION-FlanT5-XL.pth"
    held = torch.load(file, weights_only=True)
    held["model"]["third_adapter.weight"] = torch.ones(1)
    torch.save(held, file)
    with pytest.raises(BadInput, match=r"third_adapter\.weight"):
        load(folder)
