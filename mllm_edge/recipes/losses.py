"""Losses between mask logits and masks, each summed over the masks and divided by their number."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SCALE = 1000.0  # groundingLMM's dice divides the sums by it, which makes its smoothing term matter
SMOOTH = 1e-6


def upscaled(logits: Tensor, size: int) -> Tensor:
    """Logits [n,h,w] upscaled to a square picture's resolution, [n,size,size]."""
    return functional.interpolate(logits.unsqueeze(1).float(), (size, size), mode="bilinear").squeeze(1)


def bce_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy of [n,H,W], mean over pixels; 0 for no masks (groundingLMM `compute_sigmoid_ce_loss`)."""
    loss = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    return loss.flatten(1).mean(1).sum() / (len(masks) + 1e-8)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - dice of [n,H,W]; 0 for no masks (groundingLMM `calculate_dice_loss`)."""
    chances, truth = torch.sigmoid(logits).flatten(1), masks.flatten(1)  # [n,H*W] each
    shared = 2 * (chances / SCALE * truth).sum(1)  # [n]
    whole = (chances / SCALE).sum(1) + (truth / SCALE).sum(1)
    return (1 - (shared + SMOOTH) / (whole + SMOOTH)).sum() / (len(masks) + 1e-8)


@torch.no_grad()
def mean_iou(logits: Tensor, masks: Tensor) -> Tensor:
    """Mean IoU of logits > 0 [n,H,W] with masks; 1 for no masks."""
    found, truth = logits.flatten(1) > 0, masks.flatten(1) > 0.5  # [n,H*W] each
    union = (found | truth).sum(1).clamp(min=1)
    ious = (found & truth).sum(1) / union  # [n]
    return ious.mean() if len(ious) else torch.ones((), device=logits.device)
