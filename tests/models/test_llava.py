"""LLaVA's wiring: connector, splice, templates, configs."""

import dataclasses

import pytest
import torch

from mllm_edge.errors import BadInput
from mllm_edge.models import get
from mllm_edge.models.blocks.connectors import MergeCells
from mllm_edge.models.blocks.vit import VitDims
from mllm_edge.models.language.llama import LlamaDims
from mllm_edge.models.llava.model import CONFIGS, IMAGE_INDEX, Llava, LlavaDims, tensor_shapes
from mllm_edge.models.llava.prompts import PROMPTS

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
        sizes = [sum(p.numel() for p in CONFIGS[name].projector().parameters()) for name in ("7b", "13b")]
    assert sizes == [20_979_712, 31_467_520]  # reference: 7B and 13B


def test_unknown_connector_is_named() -> None:
    with pytest.raises(BadInput, match="resampler"):
        dataclasses.replace(SMALL, connector="resampler").projector()


def test_embeddings_of_neighbouring_cells_are_merged() -> None:
    merging = dataclasses.replace(SMALL, connector="linear", merge=2)
    assert (SMALL.vision.patches, merging.image_tokens) == (4, 1)
    model = merging.projector()
    features = torch.randn(2, 4, SMALL.vision.width)
    torch.testing.assert_close(model(features)[:, 0], model[0](features).mean(dim=1))
    rows = torch.arange(16.0).reshape(1, 16, 1)  # 4 x 4 cells: 0 1 4 5 | 2 3 6 7 | ...
    assert MergeCells(2)(rows).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_features_that_do_not_fall_into_squares_are_refused() -> None:
    with pytest.raises(BadInput, match="4 features do not fall into squares of 3 x 3"):
        dataclasses.replace(SMALL, merge=3).projector()


def published_tensors(width: int, ffn_width: int, layers: int) -> dict[str, tuple[int, ...]]:
    """The list of `liuhaotian/llava-v1.5-*` with `openai/clip-vit-large-patch14-336`, under our prefixes.

    CLIP has 24 blocks; the tap at -2 needs 23, and nothing after them.
    """
    llm: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, width), "lm_head.weight": (32000, width)}
    llm["model.norm.weight"] = (width,)
    for i in range(layers):
        layer = f"model.layers.{i}."
        llm |= {f"{layer}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        llm |= {f"{layer}mlp.{name}_proj.weight": (ffn_width, width) for name in ("gate", "up")}
        llm |= {f"{layer}mlp.down_proj.weight": (width, ffn_width)}
        llm |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    clip: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1024,),
        "embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "embeddings.position_embedding.weight": (577, 1024),
        "pre_layrnorm.weight": (1024,),
        "pre_layrnorm.bias": (1024,),
    }
    for i in range(23):
        block = f"encoder.layers.{i}."
        linears = {f"self_attn.{name}_proj": (1024, 1024) for name in ("q", "k", "v", "out")}
        linears |= {"mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
        for name, shape in linears.items():
            clip |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        clip |= {f"{block}layer_norm{n}.{kind}": (1024,) for n in (1, 2) for kind in ("weight", "bias")}
    projector = {"0.weight": (width, 1024), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    parts = {"language_model": llm, "vision_encoder": clip, "connector": projector}
    return {f"{part}.{name}": shape for part, names in parts.items() for name, shape in names.items()}


@pytest.mark.parametrize(
    ("config", "width", "ffn_width", "layers"), [("7b", 4096, 11008, 32), ("13b", 5120, 13824, 40)]
)
def test_tensor_list_is_that_of_the_published_checkpoint(config: str, width: int, ffn_width: int, layers: int) -> None:
    assert tensor_shapes(CONFIGS[config]) == published_tensors(width, ffn_width, layers)


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
