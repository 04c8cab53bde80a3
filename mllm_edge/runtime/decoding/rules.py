"""Rules edit logits before a token is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mllm_edge.runtime.engines.interface import Floats

Rule = Callable[[Sequence[int], Floats], None]  # the answer's ids so far, and logits [V] to edit in place


def never(tokens: Sequence[int]) -> Rule:
    """Tokens that are not chosen: those that only follow another one."""
    barred = np.array(tokens, np.int64)

    def rule(ids: Sequence[int], logits: Floats) -> None:
        logits[barred] = -np.inf

    return rule


def at_least(count: int, ends: Sequence[int]) -> Rule:
    """No end before `count` tokens (transformers `MinNewTokensLengthLogitsProcessor`)."""
    barred = np.array(ends, np.int64)

    def rule(ids: Sequence[int], logits: Floats) -> None:
        if len(ids) < count:
            logits[barred] = -np.inf

    return rule


def group_members(groups: Mapping[int, Sequence[int]]) -> list[int]:
    """The tokens of groups that are forced and never chosen."""
    return [token for first, rest in groups.items() for token in rest if token != first]
