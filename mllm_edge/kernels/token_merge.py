"""Token merging: a picture's embeddings become fewer, the most similar ones their mean.

Bipartite soft matching (Bolya et al. 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3) between
connector and decoder, where it needs no weights and no training. Here the cosine of the embeddings themselves decides,
and what is left keeps the reading order of the picture, as the decoder numbers its positions.

Written with comparisons and products alone: exported to ONNX it has no scatter, which TensorRT refuses or gets wrong
(its issues 3650 and 3750), and no sort whose order among equals differs from machine to machine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class TokenMerge(nn.Module):
    """`merge_tokens` as a layer."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens

    def forward(self, embeds: Tensor) -> Tensor:
        return merge_tokens(embeds, self.tokens)


def merge_tokens(embeds: Tensor, tokens: int) -> Tensor:
    """Merge [B,N,D] to [B,tokens,D], each the mean of one or more of the N, in the order of the last of each.

    In rounds: tokens at even places look for the most similar one at an odd place (the first among equals); the pairs
    with the highest cosine (again the first among equals) are merged, half of the tokens at most. Of a token that was
    merged before, the mean counts as often as it has parts.

    Raises:
        ValueError: `tokens` is not 1 to N.
    """
    number = embeds.shape[1]
    if not 1 <= tokens <= number:
        raise ValueError(f"cannot merge {number} tokens to {tokens}")
    sizes = embeds.new_ones(embeds.shape[0], number, 1)
    while number > tokens:
        merged = min(number - tokens, number // 2)
        matrix = matching(embeds, merged)
        total = matrix @ sizes
        embeds, sizes = matrix @ (embeds * sizes) / total, total
        number -= merged
    return embeds


def matching(embeds: Tensor, merged: int) -> Tensor:
    """Which token of [B,N,D] becomes part of which: a matrix [B,N-merged,N] of zeros, and a single one per column."""
    number = embeds.shape[1]
    place = torch.arange(number, device=embeds.device)
    even = place[0::2]
    direction = functional.normalize(embeds.float(), dim=-1)
    cosine = direction[:, 0::2] @ direction[:, 1::2].transpose(1, 2)
    best, partner = cosine.max(dim=-1)
    # how many go before it: those with a higher cosine, and those of the same that stand before it
    higher = best[:, None, :] > best[:, :, None]
    same = (best[:, None, :] == best[:, :, None]) & (even[None, :] < even[:, None])
    goes = (higher | same).sum(dim=-1) < merged
    target = torch.where(goes, 2 * partner + 1, even)  # where each token at an even place ends up
    target = torch.stack([target, (even + 1).expand_as(target)], dim=2).flatten(1)[:, :number]  # the odd ones stay
    first_highest = torch.where(target == place, (number - place).float(), 0.0)
    kept = first_highest.topk(number - merged, dim=1).indices
    return (kept[:, :, None] == target[:, None, :]).to(embeds.dtype)
