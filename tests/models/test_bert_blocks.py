"""EVA, the Q-Former and BERT's layer against transformers' classes on the same random weights."""

import pytest
import torch
from transformers import (
    BertConfig,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)
from transformers.models.bert.modeling_bert import BertLayer as LibraryLayer
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from mllm_edge.models.blocks.bert import BertDims, BertLayer
from mllm_edge.models.blocks.eva import EvaDims, EvaEncoder
from mllm_edge.models.blocks.qformer import QFormer, QFormerDims


def randomize(module: torch.nn.Module) -> None:
    """Weights as large as trained ones: the libraries' own hardly leave the input's neighborhood."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)


def test_eva_equals_blip2s_vision_model() -> None:
    dims = EvaDims(image_size=28, patch_size=7, width=32, heads=4, mlp_width=48, taps=(2, 1, 0))
    config = Blip2VisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    theirs = Blip2VisionModel(config).eval()
    randomize(theirs)
    held = theirs.state_dict()
    with torch.no_grad():
        for name in held:  # EVA's keys have no bias; transformers stores zeros for it
            if name.endswith("qkv.bias"):
                held[name][32:64] = 0
    ours = EvaEncoder(dims).eval()
    state = {
        "class_embedding": held["embeddings.class_embedding"].flatten(),
        "patch_embedding.weight": held["embeddings.patch_embedding.weight"],
        "patch_embedding.bias": held["embeddings.patch_embedding.bias"],
        "position_embedding.weight": held["embeddings.position_embedding"][0],
    }
    for number in range(3):
        before, after = f"encoder.layers.{number}.", f"layers.{number}."
        for kind in ("weight", "bias"):
            for part, tensor in zip("qkv", held[f"{before}self_attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{after}self_attn.{part}_proj.{kind}"] = tensor
            state[f"{after}self_attn.out_proj.{kind}"] = held[f"{before}self_attn.projection.{kind}"]
            for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{after}{name}.{kind}"] = held[f"{before}{name}.{kind}"]
    ours.load_state_dict(state)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True).hidden_states
        taps = ours(pixels)
    assert [tap.shape for tap in taps] == [(2, 17, 32)] * 3
    for tap, number in zip(taps, dims.taps, strict=True):
        torch.testing.assert_close(tap, expected[number + 1], rtol=1e-4, atol=1e-4)


def named(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names of a Q-Former as LAVIS and we have them."""
    replaced = {"attention.attention.": "attention.self.", "embeddings.layernorm.": "embeddings.LayerNorm."}
    found = {}
    for name, tensor in state.items():
        for theirs, ours in replaced.items():
            name = name.replace(theirs, ours)
        found[name] = tensor
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_the_q_former_that_reads_a_question_equals_instructblips(padded: bool) -> None:
    dims = QFormerDims(width=32, layers=4, heads=4, mlp_width=48, queries=5, read_width=24, vocabulary=50, positions=16)
    config = InstructBlipQFormerConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
        encoder_hidden_size=24,
        cross_attention_frequency=2,
        hidden_act="gelu",
    )
    theirs = InstructBlipQFormerModel(config).eval()
    randomize(theirs)
    ours = QFormer(dims).eval()
    missing, unknown = ours.load_state_dict(named(theirs.state_dict()), strict=False)
    assert missing == ["query_tokens"] and not unknown
    features, ids = torch.randn(2, 7, 24), torch.randint(1, 50, (2, 6))
    mask = torch.ones(2, 6)
    if padded:
        mask[1, 4:] = 0
    with torch.no_grad():
        queries = ours.query_tokens.expand(2, -1, -1)
        whole = torch.cat([torch.ones(2, 5), mask], dim=1)
        expected = theirs(ids, whole, query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        rows = ours(features, ids, mask)
        torch.testing.assert_close(rows, expected[:, :5], rtol=1e-4, atol=1e-4)
        if padded:
            torch.testing.assert_close(ours(features[1:], ids[1:, :4]), rows[1:], rtol=1e-4, atol=1e-4)


def test_the_q_former_without_words_equals_blip2s() -> None:
    dims = QFormerDims(width=32, layers=3, heads=4, mlp_width=48, queries=5, read_width=24)
    config = Blip2QFormerConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        encoder_hidden_size=24,
        cross_attention_frequency=2,
        hidden_act="gelu",
    )
    theirs = Blip2QFormerModel(config).eval()
    randomize(theirs)
    state = {name.replace("layernorm.", "embeddings.LayerNorm.", 1): t for name, t in theirs.state_dict().items()}
    state = {name.replace("attention.attention.", "attention.self."): tensor for name, tensor in state.items()}
    ours = QFormer(dims).eval()
    missing, unknown = ours.load_state_dict(state, strict=False)
    assert missing == ["query_tokens"] and not unknown
    features = torch.randn(2, 7, 24)
    with torch.no_grad():
        expected = theirs(query_embeds=ours.query_tokens, encoder_hidden_states=features[:1]).last_hidden_state
        torch.testing.assert_close(ours(features[:1]), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_with_cross_attention_equals_berts() -> None:
    config = BertConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, is_decoder=True, add_cross_attention=True
    )
    config._attn_implementation = "eager"
    theirs = LibraryLayer(config).eval()
    randomize(theirs)
    ours = BertLayer(BertDims(32, 4, 48, cross_width=32)).eval()
    ours.load_state_dict(theirs.state_dict())
    x, read = torch.randn(2, 6, 32), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = theirs(x, encoder_hidden_states=read)
        torch.testing.assert_close(ours(x, read), expected[0] if isinstance(expected, tuple) else expected)


def test_a_layer_without_self_attention_looks_at_each_row_alone() -> None:
    layer = BertLayer(BertDims(16, 2, 24, cross_width=8, looks_inside=False)).eval()
    x, read = torch.randn(1, 5, 16), torch.randn(1, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, read)[:, 2:3], layer(x[:, 2:3], read))
