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


def at_least(count: int, tokens: Sequence[int]) -> Rule:
    """None of `tokens` before there are `count`: no end (transformers `MinNewTokensLengthLogitsProcessor`), and no
    group (Koh et al. 2023, their `min_word_tokens`)."""
    barred = np.array(tokens, np.int64)

    def rule(ids: Sequence[int], logits: Floats) -> None:
        if len(ids) < count:
            logits[barred] = -np.inf

    return rule


def favored(tokens: Sequence[int], scale: float) -> Rule:
    """Tokens made likelier: a logit becomes its size times `scale` (Koh et al. 2023, their `gen_scale_factor`)."""
    likelier = np.array(tokens, np.int64)

    def rule(ids: Sequence[int], logits: Floats) -> None:
        logits[likelier] = np.abs(logits[likelier]) * np.float32(scale)

    return rule


def one_box(pieces: Sequence[str], ends: Sequence[int], decimals: int) -> Rule:
    """An answer that is one box, "[x1,y1,x2,y2]" in parts of the picture with `decimals` decimals, and has an area.

    Args:
        pieces: the text of each token.
        ends: the tokens that end an answer; one of them follows the box.
        decimals: of each number.
    """
    usable = [token for token, piece in enumerate(pieces) if piece and not piece.strip(" []0123456789.,")]

    def rule(ids: Sequence[int], logits: Floats) -> None:
        said = "".join(pieces[token] for token in ids)
        fitting = [token for token in usable if begins_box(said + pieces[token], decimals)]
        kept = np.array(fitting or list(ends), np.int64)
        values = logits[kept]
        logits[:] = -np.inf
        logits[kept] = values

    return rule


def begins_box(text: str, decimals: int) -> bool:
    """Whether a box with an area can be written that begins with `text` (a space before it does not count)."""
    if text[:2].isspace() and len(text) > 1:
        return False  # one space at most, or there is no end of them
    text, length, most = text.lstrip(), decimals + 2, 10**decimals
    whole = f"[{','.join(['#' * length] * 4)}]"
    if len(text) > len(whole):
        return False
    spans = [(1 + at * (length + 1), 1 + at * (length + 1) + length) for at in range(4)]
    if any(letter != there for letter, there in zip(text, whole, strict=False) if there != "#"):
        return False
    numbers: list[int] = []
    for at, (start, stop) in enumerate(spans):
        digits = text[start:stop]
        if not digits:
            return True
        plain = digits[:1] + digits[2:]
        if digits[1:2] not in ("", ".") or not (plain.isascii() and plain.isdigit()):
            return False
        lowest = int(plain.ljust(decimals + 1, "0"))
        highest = min(most, int(plain.ljust(decimals + 1, "9")))
        least = numbers[at - 2] + 1 if at > 1 else 0
        if lowest > (most if at > 1 else most - 1) or highest < least:
            return False
        numbers.append(lowest)
    return True


def group_members(groups: Mapping[int, Sequence[int]]) -> list[int]:
    """The tokens of groups that are forced and never chosen."""
    return [token for first, rest in groups.items() for token in rest if token != first]
