"""Token merging: fewer embeddings per picture, by averaging the most similar ones.

Bipartite soft matching (Bolya et al. 2023, "Token Merging: Your ViT But Faster", arXiv 2210.09461, section 3) between
connector and decoder, without weights or training. Similarity is the cosine of the embeddings themselves, and the
merged tokens keep the picture's reading order, in which the decoder numbers its positions.

Only comparisons and products: the exported ONNX has no scatter, which TensorRT refuses or gets wrong (its issues 3650
and 3750), and no sort whose order among ties differs between machines.
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
    """Merge [B,N,D] to [B,tokens,D], each the mean of one or more of the N, ordered by the last of them.

    In each round, every token at an even index is paired with the most similar one at an odd index (first among ties);
    the pairs with the highest cosine (again first among ties) are merged, at most half of the tokens. Means are
    weighted by the number of original tokens in each.

    Raises:
        ValueError: `tokens` is not 1 to N.
    """
    number = embeds.shape[1]
    if not 1 <= tokens <= number:
        raise ValueError(f"cannot merge {number} tokens to {tokens}")
    sizes = embeds.new_ones(embeds.shape[0], number, 1)  # [B,N,1], original tokens per token
    while number > tokens:
        merged = min(number - tokens, number // 2)
        matrix = matching(embeds, merged)  # [B,N-merged,N]
        total = matrix @ sizes  # [B,N-merged,1]
        embeds, sizes = matrix @ (embeds * sizes) / total, total  # [B,N-merged,D]
        number -= merged
    return embeds


def matching(embeds: Tensor, merged: int) -> Tensor:
    """Which input token of [B,N,D] goes into which output token: [B,N-merged,N], a single 1 per column, else 0."""
    number = embeds.shape[1]
    place = torch.arange(number, device=embeds.device)
    even = place[0::2]  # [E], E = ceil(N/2)
    direction = functional.normalize(embeds.float(), dim=-1)
    cosine = direction[:, 0::2] @ direction[:, 1::2].transpose(1, 2)  # [B,E,N-E]
    best, partner = cosine.max(dim=-1)  # [B,E] each
    # rank of each even token: tokens with a higher cosine, and earlier ones with an equal cosine, come first
    higher = best[:, None, :] > best[:, :, None]
    same = (best[:, None, :] == best[:, :, None]) & (even[None, :] < even[:, None])
    goes = (higher | same).sum(dim=-1) < merged  # [B,E]
    target = torch.where(goes, 2 * partner + 1, even)  # [B,E], where each even token ends up
    target = torch.stack([target, (even + 1).expand_as(target)], dim=2).flatten(1)[:, :number]  # [B,N], odd ones stay
    first_highest = torch.where(target == place, (number - place).float(), 0.0)  # [B,N]
    kept = first_highest.topk(number - merged, dim=1).indices  # [B,N-merged]
    return (kept[:, :, None] == target[:, None, :]).to(embeds.dtype)
