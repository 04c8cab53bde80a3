"""LLaVA's wiring: connector, splice, templates, configs."""

import pytest
import torch

from mllm_edge.errors import BadInput
from mllm_edge.models import get
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.interface import LlamaDims
from mllm_edge.models.llava import CONFIGS, IMAGE_INDEX, PROMPTS, Llava, LlavaDims, connector, tensor_shapes

SMALL = LlavaDims(
    vision=VitDims(image_size=14, patch_size=7, width=32, layers=2, heads=2, mlp_width=64),
    language=LlamaDims(vocabulary=50, width=64, ffn_width=96, layers=2, heads=4, kv_heads=2, context=64),
)


def test_splice_puts_each_picture_at_its_place() -> None:
    torch.manual_seed(0)
    model = Llava(SMALL)
    ids = torch.tensor([[1, *[IMAGE_INDEX] * 4, 7], [1, 8, *[IMAGE_INDEX] * 4]])
    pictures = torch.randn(2, 4, 64)
    embeds = model.splice(ids, pictures)
    table = model.language_model.get_input_embeddings().weight
    assert torch.equal(embeds[0, 1:5], pictures[0])
    assert torch.equal(embeds[1, 2:], pictures[1])
    assert torch.equal(embeds[0, 5], table[7])
    assert torch.equal(embeds[1, 1], table[8])


def test_connector_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in connector("mlp2x_gelu", 1024, width).parameters()) for width in (4096, 5120)]
    assert sizes == [20_979_712, 31_467_520]  # reference: 7B and 13B


def test_unknown_connector_is_named() -> None:
    with pytest.raises(BadInput, match="resampler"):
        connector("resampler", 8, 8)


def test_7b_tensor_list() -> None:
    shapes = tensor_shapes(CONFIGS["7b"])
    assert shapes["connector.0.weight"] == (4096, 1024)
    assert shapes["connector.2.weight"] == (4096, 4096)
    assert shapes["language_model.model.embed_tokens.weight"] == (32000, 4096)
    assert shapes["language_model.model.layers.31.mlp.down_proj.weight"] == (4096, 11008)
    assert shapes["vision_encoder.embeddings.position_embedding.weight"] == (577, 1024)
    assert "vision_encoder.encoder.layers.22.mlp.fc1.weight" in shapes
    assert "vision_encoder.encoder.layers.23.mlp.fc1.weight" not in shapes


def test_1b_has_grouped_heads() -> None:
    shapes = tensor_shapes(CONFIGS["1b"])
    assert shapes["language_model.model.layers.21.self_attn.k_proj.weight"] == (256, 2048)
    assert "language_model.model.layers.22.self_attn.k_proj.weight" not in shapes


def test_vicuna_prompt_is_the_published_one() -> None:
    prompt = PROMPTS["vicuna_v1"]
    assert prompt.first.format(system=prompt.system, text="<image>\nWhat is this?") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is this? ASSISTANT:"
    )
    assert "curious human" in PROMPTS["llava_v1"].system


def test_unknown_system_names_the_nearest() -> None:
    with pytest.raises(BadInput, match="llava"):
        get("lava")
