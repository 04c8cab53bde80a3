"""Texts and pictures as vectors that are compared (Radford et al. 2021, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(texts: Tensor, images: Tensor, scale: Tensor) -> Tensor:
    """The mean of both directions' cross-entropy, of pairs [B,d] each; `scale` is the logarithm of the factor that
    cosines are multiplied with."""
    logits = scale.exp() * functional.normalize(texts.float(), dim=-1) @ functional.normalize(images.float(), dim=-1).T
    truth = torch.arange(len(texts), device=logits.device)
    loss: Tensor = (functional.cross_entropy(logits, truth) + functional.cross_entropy(logits.T, truth)) / 2
    return loss


@torch.no_grad()
def recall(texts: Tensor, images: Tensor) -> dict[str, float]:
    """R@1 of each direction among pairs [n,d]: how often the nearest is the own one."""
    cosines = functional.normalize(texts.float(), dim=-1) @ functional.normalize(images.float(), dim=-1).T
    truth = torch.arange(len(texts), device=cosines.device)
    return {
        "text_to_image": round(float((cosines.argmax(1) == truth).float().mean()), 4),
        "image_to_text": round(float((cosines.argmax(0) == truth).float().mean()), 4),
    }
