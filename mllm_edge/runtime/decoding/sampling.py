"""Choosing the next token with llama.cpp's samplers, from logits of any engine."""

from __future__ import annotations

import ctypes

import numpy as np

from mllm_edge.bundle.manifest import Generation
from mllm_edge.errors import BadInput
from mllm_edge.runtime.engines.interface import Floats

_RANDOM_SEED = 2**32 - 1  # means "take one at random" (LLAMA_DEFAULT_SEED), so it is never passed on
PENALTY_WINDOW = 64  # generated tokens that the repetition penalty looks back on, llama.cpp's default
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Sampler:
    """A chain of llama.cpp samplers: repetition penalty, top-k, top-p, temperature, then a seeded draw.

    Temperature 0 is greedy; it still obeys the repetition penalty, which counts generated tokens only. The same seed
    and logits give the same tokens.

    Args:
        vocabulary: number of logits.
        settings: checked by `check_settings`.
        seed: any integer, taken modulo 2**32 - 1.
    """

    def __init__(self, vocabulary: int, settings: Generation, seed: int):
        from mllm_edge.runtime.engines.llama.library import library

        self._llama = llama = library()
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        self._candidates = np.zeros(vocabulary, _CANDIDATE)
        self._ids = np.arange(vocabulary, dtype=np.int32)
        links = []
        if settings.repeat_penalty != 1:
            links.append(
                llama.llama_sampler_init_penalties(vocabulary, PENALTY_WINDOW, settings.repeat_penalty, 0.0, 0.0)
            )
        if settings.temperature == 0:
            links.append(llama.llama_sampler_init_greedy())
        else:
            if settings.top_k > 0:
                links.append(llama.llama_sampler_init_top_k(settings.top_k))
            links.append(llama.llama_sampler_init_top_p(settings.top_p, 1))
            links.append(llama.llama_sampler_init_temp(settings.temperature))
            links.append(llama.llama_sampler_init_dist(seed % _RANDOM_SEED))
        for link in links:
            llama.llama_sampler_chain_add(self._chain, link)

    def sample(self, logits: Floats) -> int:
        """Choose a token from logits [V] and remember it for the penalty."""
        llama, candidates = self._llama, self._candidates
        candidates["id"], candidates["logit"], candidates["p"] = self._ids, logits, 0
        data = candidates.ctypes.data_as(ctypes.POINTER(llama.llama_token_data))
        array = llama.llama_token_data_array(data, len(candidates), -1, False)
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        token = int(array.data[array.selected].id)
        llama.llama_sampler_accept(self._chain, token)
        return token

    def close(self) -> None:
        """Free the chain and its samplers."""
        if self._chain:
            self._llama.llama_sampler_free(self._chain)
            self._chain = None


def check_settings(settings: Generation) -> None:
    """Raises BadInput for a setting outside its range."""
    rules = [
        ("max_tokens", settings.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= settings.temperature < float("inf"), "0 (greedy) or more"),
        ("top_p", 0 < settings.top_p <= 1, "above 0 and at most 1"),
        ("top_k", settings.top_k >= 0, "0 (off) or more"),
        ("repeat_penalty", 0 < settings.repeat_penalty < float("inf"), "above 0 (1 is off)"),
    ]
    for name, fits, what in rules:
        if not fits:
            raise BadInput(f"{name} is {getattr(settings, name)}; it must be {what}")
