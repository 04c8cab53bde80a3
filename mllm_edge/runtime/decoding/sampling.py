"""Choosing the next token from logits of any engine."""

from __future__ import annotations

from collections import deque

import numpy as np

from mllm_edge.bundle.manifest import Generation
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.interface import Floats

SEEDS = 1 << 64
MOST_SCALE = 1e6  # of the tokens that groups follow; far more and a logit is infinite
PENALTY_WINDOW = 64  # generated tokens that the repetition penalty looks back on, llama.cpp's default


class Sampler:
    """Repetition penalty, top-k, top-p, temperature, then a seeded draw: llama.cpp's chain, in its order.

    Temperature 0 is greedy; it still obeys the repetition penalty, which counts generated tokens only. The same seed
    and logits give the same tokens on every machine.

    Args:
        settings: checked by `check_settings`.
        seed: checked by `check_seed`.
    """

    def __init__(self, settings: Generation, seed: int):
        self._settings = settings
        self._random = np.random.default_rng(seed)
        self._recent: deque[int] = deque(maxlen=PENALTY_WINDOW)

    def sample(self, logits: Floats) -> int:
        """Choose a token from logits [V], which stay as they are, and remember it for the penalty."""
        settings = self._settings
        if settings.repeat_penalty != 1:
            logits = penalized_by(logits, np.unique(self._recent).astype(np.int64), settings.repeat_penalty)
        if settings.temperature == 0:
            token = int(logits.argmax())
        else:
            kept, shares = likeliest(logits, settings.top_k, settings.top_p)
            weights = shares ** (1 / settings.temperature)  # p^(1/T) is softmax(logits / T) before its sum
            reached = np.cumsum(weights)
            token = int(kept[np.searchsorted(reached, self._random.random() * reached[-1], "right")])
        self._recent.append(token)
        return token


def penalized_by(logits: Floats, tokens: np.ndarray, penalty: float) -> Floats:
    """Logits [V] with those of `tokens` made less likely: divided by the penalty, or multiplied where negative
    (Keskar et al. 2019, CTRL, section 4.1). The argument stays as it is."""
    changed = logits.copy()
    if penalty != 1 and len(tokens):
        changed[tokens] = np.where(logits[tokens] > 0, logits[tokens] / penalty, logits[tokens] * penalty)
    return changed


def likeliest(logits: Floats, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that top-k and then top-p leave, likeliest first, int64 [n], with their probabilities relative to the
    likeliest one's, float64 [n]."""
    count = len(logits) if top_k == 0 else min(top_k, len(logits))
    kept = np.arange(len(logits)) if count == len(logits) else np.argpartition(logits, -count)[-count:]
    kept = kept[np.argsort(-logits[kept], kind="stable")]
    shares = np.exp(logits[kept].astype(np.float64) - float(logits[kept[0]]))
    if top_p < 1:  # the fewest whose probabilities reach top_p
        reached = np.cumsum(shares) / shares.sum()
        count = min(int(np.searchsorted(reached, top_p)) + 1, len(kept))
        kept, shares = kept[:count], shares[:count]
    return kept, shares


def check_seed(seed: int) -> None:
    """Raises BadInput for a seed outside 64 bits."""
    if not 0 <= seed < SEEDS:
        raise BadInput(f"the seed {seed} is outside 64 bits; give 0 to {SEEDS - 1}")


def check_settings(settings: Generation) -> None:
    """Raises BadInput for a setting outside its range."""
    rules = [
        ("max_tokens", settings.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= settings.temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", 0 < settings.top_p <= 1, "above 0 and at most 1"),
        ("top_k", settings.top_k >= 0, "0 (off) or more"),
        ("repeat_penalty", 0 < settings.repeat_penalty < float("inf"), "above 0 (1 is off)"),
        ("beams", 1 <= settings.beams <= 64, "1 (no search) to 64"),
        ("length_penalty", abs(settings.length_penalty) < float("inf"), "a number"),
        ("min_tokens", settings.min_tokens >= 0, "0 or more"),
        ("group_scale", 0 < settings.group_scale <= MOST_SCALE, f"above 0 (1 is off) and at most {MOST_SCALE:.0f}"),
    ]
    for name, fits, what in rules:
        if not fits:
            raise BadInput(f"{name} is {getattr(settings, name)}; it must be {what}")
