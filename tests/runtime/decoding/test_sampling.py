from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from mllm_edge.bundle.manifest import Generation
from mllm_edge.errors import BadInput
from mllm_edge.runtime.decoding.sampling import Sampler, check_seed, check_settings, likeliest

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))
PLAIN = Generation(temperature=1.0, top_k=0, top_p=1.0)


def draw(settings: Generation, count: int = 400, seed: int = 0) -> list[int]:
    sampler = Sampler(settings, seed)
    return [sampler.sample(LOGITS) for _ in range(count)]


def test_greedy_takes_the_likeliest() -> None:
    assert set(draw(Generation(temperature=0.0), 5)) == {1}


def test_the_draw_follows_the_probabilities() -> None:
    shares = np.bincount(draw(PLAIN, 4000), minlength=4) / 4000
    np.testing.assert_allclose(shares, [0.05, 0.5, 0.15, 0.3], atol=0.03)


def test_temperature_sharpens() -> None:
    shares = np.bincount(draw(replace(PLAIN, temperature=0.5), 4000), minlength=4) / 4000
    expected = np.array([0.05, 0.5, 0.15, 0.3]) ** 2
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert set(draw(replace(PLAIN, top_k=2))) == {1, 3}
    assert set(draw(replace(PLAIN, top_p=0.7))) == {1, 3}
    assert set(draw(replace(PLAIN, top_p=0.85))) == {1, 2, 3}


def test_a_seed_reproduces() -> None:
    assert draw(PLAIN, 30, seed=5) == draw(PLAIN, 30, seed=5) != draw(PLAIN, 30, seed=6)
    for seed in (2**32 - 1, 2**40, 2**64 - 1):
        check_seed(seed)
        assert draw(PLAIN, 30, seed=seed) == draw(PLAIN, 30, seed=seed)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(BadInput, match=f"the seed {seed} is outside 64 bits; give 0 to 18446744073709551615"):
        check_seed(seed)


def test_repetition_is_penalized_even_when_greedy() -> None:
    # penalized logits are multiplied by the penalty where they are negative: 1 falls below 3, then 3 below 1 never
    tokens = draw(Generation(temperature=0.0, repeat_penalty=2.0), 3)
    assert tokens == [1, 3, 1]


def test_the_logits_are_left_alone() -> None:
    before = LOGITS.copy()
    draw(replace(PLAIN, repeat_penalty=1.5), 3)
    np.testing.assert_array_equal(LOGITS, before)


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repeat_penalty": 0.0},
    ],
)
def test_settings_out_of_range(change: dict[str, float]) -> None:
    check_settings(PLAIN)
    with pytest.raises(BadInput, match=next(iter(change))):
        check_settings(replace(PLAIN, **change))  # type: ignore[arg-type]


@settings_of(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), top_k=st.integers(0, 12), top_p=st.floats(0.05, 1), size=st.integers(1, 12))
def test_a_draw_is_one_of_the_likeliest(seed: int, top_k: int, top_p: float, size: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    kept, _ = likeliest(logits, top_k, top_p)
    assert Sampler(Generation(temperature=1.5, top_k=top_k, top_p=top_p), seed).sample(logits) in kept
    assert list(kept) == list(np.argsort(-logits, kind="stable")[: len(kept)])  # none is left out before a likelier one
