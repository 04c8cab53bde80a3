"""OPT: transformers' class with our dims, its reference, and the fields of a config that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_for_tests import random_opt
from transformers import OPTConfig, OPTForCausalLM

from mllm_edge.checkpoints.tensors import random_weights
from mllm_edge.errors import BadInput
from mllm_edge.models.language.llama import LlamaReference
from mllm_edge.models.language.opt import TABLE, OptDims, canonical, opt, opt_dims
from mllm_edge.models.parts import Decoder, filled

WHERE = Path("config.json")
DIMS = OptDims(vocabulary=96, width=32, ffn_width=80, layers=2, heads=4, context=48)
PROMPT = np.random.default_rng(0).normal(size=(5, DIMS.width)).astype(np.float32)


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def library() -> OPTForCausalLM:
    """transformers' own, with the fields of a published config."""
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        ffn_dim=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=48,
        word_embed_proj_dim=32,
    )
    return OPTForCausalLM(config).eval()


def test_the_module_is_transformers_own() -> None:
    theirs, ours = library(), random_opt(DIMS)
    assert shapes(theirs) == shapes(ours)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.tensor([[2, 1, 17, 3, 88, 1]])  # padding's token among them
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    assert not any(module.p for module in ours.modules() if isinstance(module, torch.nn.Dropout))


def test_it_learns_the_same_in_training_as_it_answers() -> None:
    model = random_opt(DIMS).train()
    rows = model.get_input_embeddings()(torch.tensor([[2, 5, 1]]))
    first, second = (model(inputs_embeds=rows).logits for _ in range(2))
    assert torch.equal(first, second)
    first.square().sum().backward()
    assert model.get_input_embeddings().weight.grad[1].abs().sum() > 0  # padding's row, too


def test_reference_rows_are_those_of_the_module_after_its_final_norm() -> None:
    module, tokens = random_opt(DIMS), [17, 3, 88]
    logits, states = LlamaReference(module).forced(PROMPT, tokens)
    assert (logits.shape, states.shape) == ((4, 96), (4, 32))
    for count in range(4):
        with torch.no_grad():
            rows = module.get_input_embeddings()(torch.tensor(tokens[:count], dtype=torch.long))
            state = module.model(inputs_embeds=torch.cat([torch.from_numpy(PROMPT), rows])[None])[0][0, -1]
            np.testing.assert_allclose(states[count], state, atol=1e-5)
            np.testing.assert_allclose(logits[count], module.lm_head(state), atol=1e-5)


def test_tokens_one_by_one_stand_at_the_positions_they_have_at_once() -> None:
    reference = LlamaReference(random_opt(DIMS))
    tokens = reference.generate(PROMPT, 20)
    logits, _ = reference.forced(PROMPT, tokens[:-1])
    assert tokens == logits.argmax(-1).tolist() and len(set(tokens)) > 5


def test_a_checkpoint_without_a_head_fills_it() -> None:
    names = {name: shape for name, shape in shapes(opt(DIMS)).items() if name != "lm_head.weight"}
    tensors = random_weights(names)
    model: Any = filled(opt(DIMS), Decoder(tensors, TABLE))
    assert torch.equal(model.lm_head.weight, tensors[TABLE].float())


@pytest.mark.parametrize("prefix", ["decoder.", "model.decoder."])
def test_names_of_published_files(prefix: str) -> None:
    mine = shapes(opt(DIMS))
    theirs = [prefix + name.removeprefix("model.decoder.") for name in mine if name != "lm_head.weight"]
    assert {canonical(name) for name in theirs} == set(mine) - {"lm_head.weight"}
    assert canonical("lm_head.weight") is None


def test_counts_by_hand() -> None:
    dims = OptDims(vocabulary=50274, width=4096, ffn_width=16384, layers=32, heads=32)
    assert dims.product_weights == 32 * 12 * 4096**2 + 50274 * 4096 == dims.prompt_weights
    assert dims.weights == dims.product_weights + 2048 * 4096
    assert (dims.kv_width, dims.attention_width) == (4096, 4096)
    trained = sum(tensor.numel() for tensor in library().parameters())
    small = 2 * (2 * 2 * 32 + 4 * 32 + 32 + 80) + 2 * 32 + 2 * 32  # norms, biases, final norm, two unused positions
    assert OptDims(96, 32, 80, 2, 4, 48).weights + small == trained


def test_dims_of_a_config() -> None:
    config = OPTConfig(
        hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=100
    )
    assert opt_dims(config.to_dict(), 50274, WHERE) == OptDims(50274, 64, 96, 3, 2, 100)
    assert opt_dims({}, 50272, WHERE) == OptDims(50272, 768, 3072, 12, 12, 2048)  # transformers' defaults: 125m


@pytest.mark.parametrize(
    "field",
    [
        {"do_layer_norm_before": False},
        {"word_embed_proj_dim": 512},
        {"activation_function": "gelu"},
        {"enable_bias": False},
        {"layer_norm_elementwise_affine": False},
        {"tie_word_embeddings": False},
        {"_remove_final_layer_norm": True},
        {"num_attention_heads": 7},
        {"num_hidden_layers": 0},
        {"ffn_dim": "wide"},
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(BadInput, match=name):
        opt_dims({"hidden_size": 768, **field}, 50272, WHERE)
