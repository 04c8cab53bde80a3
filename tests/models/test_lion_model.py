"""LION's parts: how the aggregator begins, the soft prompt, levels of knowledge, the tagger, and T5's three graphs."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from mllm_edge.models.blocks.eva import EvaDims
from mllm_edge.models.blocks.qformer import QFormerDims
from mllm_edge.models.blocks.swin import SwinDims
from mllm_edge.models.language.t5 import T5, T5Dims
from mllm_edge.models.language.t5_parts import DecoderPart, EmbedPart, EncoderPart, T5Reference, part_specs, task_rows
from mllm_edge.models.lion.model import CONFIGS, Aggregator, Lion, LionDims, Tagger, TaggerDims

T5_DIMS = T5Dims(vocabulary=60, width=32, ffn_width=48, layers=2, heads=2, head_width=8, bottleneck=4)
DIMS = LionDims(
    vision=EvaDims(image_size=28, patch_size=7, width=48, heads=4, mlp_width=64, taps=(2, 1, 0)),
    qformer=QFormerDims(24, 2, 2, 32, queries=5, read_width=48, vocabulary=40, positions=16),
    language=T5_DIMS,
    aggregator_heads=4,
    aggregator_mlp=64,
    question_length=12,
)


def test_a_fresh_aggregator_is_six_norms_of_the_last_tap() -> None:
    aggregator = Aggregator(DIMS).eval()
    taps = [torch.randn(2, 17, 48) for _ in range(3)]
    with torch.no_grad():
        normed = taps[0]
        for _ in range(6):
            normed = functional.layer_norm(normed, (48,), eps=1e-12)
        expected = aggregator.proj(aggregator.norm(normed))
        torch.testing.assert_close(aggregator(*taps), expected, rtol=1e-5, atol=1e-5)


def test_rows_of_a_picture_are_those_of_its_levels() -> None:
    pixels, question = torch.randn(1, 3, 28, 28), torch.tensor([[3, 4, 5, 0, 0]])
    for levels, rows in ((("query",), 5), (("region",), 17), (("query", "region"), 22)):
        dims = LionDims(**{**vars(DIMS), "levels": levels})
        assert dims.visual_tokens == rows
        with torch.no_grad():
            assert Lion(dims).eval().look(pixels, question).shape == (1, rows, 32)


def test_the_question_reaches_the_queries_alone() -> None:
    lion = Lion(DIMS).eval()
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        one, other = (lion.look(pixels, torch.tensor([ids])) for ids in ([3, 4, 5], [6, 7, 8]))
        padded = lion.look(pixels, torch.tensor([[3, 4, 5, 0, 0, 0]]))
    assert not torch.allclose(one[:, :5], other[:, :5])
    assert torch.equal(one[:, 5:], other[:, 5:])
    torch.testing.assert_close(one, padded)


def test_the_soft_prompt_stands_where_its_token_does() -> None:
    lion = Lion(DIMS)
    ids = torch.tensor([[7, 59, 8]])
    rows = lion.embed(ids, soft=59)
    assert torch.equal(rows[0, 1], lion.soft_prompt)
    assert torch.equal(rows[0, [0, 2]], lion.language_model.shared.weight[[7, 8]])


def test_tags_read_the_picture_each_alone() -> None:
    dims = TaggerDims(
        SwinDims(32, 8, (1, 1), (2, 2), window=4), tags=5, label_width=12, width=16, heads=2, mlp_width=24
    )
    tagger = Tagger(dims).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        chances = tagger(pixels)
        assert chances.shape == (2, 5) and not torch.allclose(chances[0], chances[1])
        tagger.label_embed[4] = 1.0  # another tag changes nothing of the first four
        torch.testing.assert_close(tagger(pixels)[:, :4], chances[:, :4])


def test_published_sizes() -> None:
    with torch.device("meta"):
        for config, width, adapters in (("4b", 2048, 536_706), ("12b", 4096, 1_073_282)):
            lion = Lion(CONFIGS[config])
            place = lion.language_model.encoder.block[0].layer[1].adapter
            assert sum(p.numel() for p in place.parameters()) == adapters  # reference/lion.md, section 2.4
            block = lion.aggregator.blocks[0]
            assert sum(p.numel() for p in block.parameters()) == 24_534_656  # section 2.3
            assert lion.dims.visual_tokens == 289 and lion.language_model.shared.weight.shape == (32128, width)


def adapted() -> T5:
    torch.manual_seed(0)
    model = T5(T5_DIMS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("task", [0, 1])
def test_the_three_graphs_are_the_model(task: int) -> None:
    model = adapted()
    rows = np.random.default_rng(1).normal(size=(9, 32)).astype(np.float32)
    prompt = np.concatenate([task_rows(T5_DIMS)[task], rows])
    reference = T5Reference(model)
    tokens = reference.generate(prompt, 6)
    logits, states = reference.forced(prompt, tokens[:-1])
    assert logits.argmax(-1).tolist() == tokens
    other = T5Reference(model).generate(np.concatenate([task_rows(T5_DIMS)[1 - task], rows]), 6)
    assert other != tokens  # the router matters
    specs = part_specs(T5_DIMS)
    with torch.no_grad():
        cross = EncoderPart(model)(torch.from_numpy(prompt)[None])
        assert [tuple(t.shape) for t in cross] == [(1, 2, 9, 8)] * 4 + [(2,)]
        assert len(cross) == len(specs["encoder"][1])
        past = [torch.full((1, 2, 16, 8), 50.0) for _ in range(4)]  # what does not count is not looked at
        for number, token in enumerate([0, *tokens[:-1]]):
            (embeds,) = EmbedPart(model)(torch.tensor([[token]]))[None]
            given = [embeds, torch.tensor([number]), *cross, *past]
            assert len(given) == len(specs["decoder"][0])
            found = DecoderPart(model)(*given)
            assert len(found) == len(specs["decoder"][1])
            np.testing.assert_allclose(found[0][0].numpy(), logits[number], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found[1][0, 0].numpy(), states[number], rtol=1e-4, atol=1e-4)
            for cache, new in zip(past, found[2:], strict=True):
                cache[:, :, number : number + 1] = new


def test_training_and_generation_agree() -> None:
    torch.manual_seed(0)
    lion = Lion(DIMS).eval()
    task = torch.tensor([1.0, 0.0])
    visual, text = torch.randn(1, 22, 32), torch.randn(1, 6, 32)
    answer = torch.tensor([[0, 5, 9]])
    with torch.no_grad():
        logits = lion(visual, text, torch.ones(1, 6), answer, task)
        prompt = torch.cat([torch.from_numpy(task_rows(T5_DIMS)[0])[None], visual, text], dim=1)[0].numpy()
        expected, _ = T5Reference(lion.language_model).forced(prompt, [5, 9])
    np.testing.assert_allclose(logits[0].numpy(), expected, rtol=1e-4, atol=1e-5)
