"""T5 against transformers' class, and LION's adapters by hand."""

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from mllm_edge.models.language.t5 import T5, Mixture, T5Dims, buckets
from mllm_edge.models.language.t5_parts import extended

IMAGES = torch.tensor([0.0, 1.0])
DIMS = T5Dims(vocabulary=60, width=32, ffn_width=48, layers=3, heads=4, head_width=6)


def library() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=60,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "layer_norm" in name else 0.0, 0.25)
    return model


def ours(theirs: T5ForConditionalGeneration, dims: T5Dims = DIMS) -> T5:
    model = T5(dims).eval()
    state = {name: t for name, t in theirs.state_dict().items() if ".embed_tokens." not in name}
    model.load_state_dict(state)
    return model


def test_logits_are_those_of_transformers() -> None:
    theirs = library()
    model = ours(theirs)
    embeds, answer = torch.randn(2, 150, 32), torch.randint(0, 60, (2, 9))  # beyond the furthest distance
    mask = torch.ones(2, 150)
    mask[1, 100:] = 0
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=answer).logits
        cross = model.decoder.cross(model.encoder(embeds, mask=mask))
        states, _ = model.decoder(model.shared(answer), cross, mask=mask)
        torch.testing.assert_close(model.logits(states), expected, rtol=1e-4, atol=1e-4)


def test_tokens_one_by_one_equal_transformers_generate() -> None:
    theirs = library()
    model = ours(theirs)
    embeds = torch.randn(1, 20, 32)
    with torch.no_grad():
        expected = theirs.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
        cross = model.decoder.cross(model.encoder(embeds))
        tokens, past = [0], ()
        while len(tokens) <= len(expected):
            states, new = model.decoder(model.shared(torch.tensor([tokens[-1:]])), cross, past)
            past = extended(past, new)
            tokens.append(int(model.logits(states)[0, -1].argmax()))
    assert tokens[1:] == expected and len(set(expected)) > 2


def test_the_exact_gelu_is_another_function() -> None:
    theirs = library()
    dims = T5Dims(**{**vars(DIMS), "activation": "gelu"})
    embeds = torch.randn(1, 20, 32)
    with torch.no_grad():
        stock, exact = ours(theirs).encoder(embeds), ours(theirs, dims).encoder(embeds)
    assert 1e-6 < (stock - exact).abs().max() < 0.1


def test_buckets_by_hand() -> None:
    distances = torch.tensor([-200, -9, -8, -7, -1, 0, 1, 7, 8, 200])
    # of 8 buckets one way: 0..3 each their own, then 4 + log(d / 4) / log(16 / 4) * 4, at most 7
    assert buckets(distances, False, 8, 16).tolist() == [7, 6, 6, 5, 1, 0, 0, 0, 0, 0]
    # both ways 4 a side, those of later positions from 4 on
    assert buckets(distances, True, 8, 16).tolist() == [3, 3, 3, 3, 1, 0, 5, 7, 7, 7]


def adapted(seed: int = 0) -> T5Dims:
    return T5Dims(**{**vars(DIMS), "bottleneck": 5})


def test_fresh_adapters_change_nothing() -> None:
    theirs = library()
    plain, model = ours(theirs), T5(adapted()).eval()
    missing, _ = model.load_state_dict(plain.state_dict(), strict=False)
    assert len(missing) == 2 * 3 * (2 * 5 + 2)  # places x (adapters x their tensors + ratios)
    embeds, task = torch.randn(1, 10, 32), IMAGES
    with torch.no_grad():
        assert torch.equal(plain.encoder(embeds), model.encoder(embeds, task))


def test_a_mixture_by_hand() -> None:
    torch.manual_seed(0)
    mixture = Mixture(adapted())
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_()
        x = torch.randn(2, 3, 32)
        for task in (0, 1):
            expected = torch.zeros_like(x)
            for adapter, ratio in zip(mixture.adapters, (mixture.router_ratio1, mixture.router_ratio2), strict=True):
                low = (x @ adapter.down_proj.weight.T + adapter.down_proj.bias).clamp(min=0)
                expected += ratio[task] * adapter.scale * (low @ adapter.up_proj.weight.T + adapter.up_proj.bias)
            torch.testing.assert_close(mixture(x, torch.eye(2)[task]), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", [0, 1])
def test_a_mixture_is_one_adapter_of_twice_the_width(task: int) -> None:
    """For a fixed type of task; the graphs keep the gates apart, so that both types share constant weights."""
    torch.manual_seed(0)
    mixture = Mixture(adapted())
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.normal_(std=0.3)
        first, second = mixture.adapters
        gates = [
            ratio[task] * one.scale for ratio, one in ((mixture.router_ratio1, first), (mixture.router_ratio2, second))
        ]
        down = torch.cat([first.down_proj.weight, second.down_proj.weight])  # [2b,D]
        bias = torch.cat([first.down_proj.bias, second.down_proj.bias])
        up = torch.cat([gate[:, None] * one.up_proj.weight for gate, one in zip(gates, mixture.adapters)], dim=1)
        last = sum(gate * one.up_proj.bias for gate, one in zip(gates, mixture.adapters))
        x = torch.randn(2, 3, 32)
        folded = (x @ down.T + bias).clamp(min=0) @ up.T + last
        torch.testing.assert_close(mixture(x, torch.eye(2)[task]), folded, rtol=1e-5, atol=1e-5)


def test_each_task_begins_with_its_own_adapter() -> None:
    mixture = Mixture(adapted())
    assert mixture.router_ratio1.tolist() == [[1.0] * 32, [0.0] * 32]
    assert mixture.router_ratio2.tolist() == [[0.0] * 32, [1.0] * 32]
