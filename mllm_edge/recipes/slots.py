"""Linear heads that tell the things of a scene, from left to right, out of one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from mllm_edge.recipes.data.conversation import IGNORE
from mllm_edge.recipes.data.gill_scenes import CLASSES, SLOTS


class SlotHeads(nn.Linear):
    """Of each of `SLOTS` things its color, shape, size and place, one class more each where there is none."""

    def __init__(self, width: int):
        split = [SLOTS * (len(words) + 1) for words in CLASSES.values()]
        super().__init__(width, sum(split))
        self.split = split

    def losses(self, vectors: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the classes' mean cross-entropy, and the share of each that is right, of vectors [B,D] and labels
        int64 [B,SLOTS] by class, -100 where nothing is said."""
        total = torch.zeros((), device=vectors.device)
        right: dict[str, Tensor] = {}
        for name, logits in zip(CLASSES, self(vectors).float().split(self.split, dim=-1), strict=True):
            classes = logits.unflatten(1, (SLOTS, -1)).transpose(1, 2)  # [B,classes,SLOTS]
            known = labels[name] != IGNORE
            each = functional.cross_entropy(classes, labels[name], ignore_index=IGNORE, reduction="sum")
            many = known.sum().clamp(min=1)
            total = total + each / many
            right[name] = ((classes.argmax(1) == labels[name]) & known).sum() / many
        return total, right
