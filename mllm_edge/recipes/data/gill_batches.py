"""What GILL reads in a step: pictures and captions, in three modes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mllm_edge.models.gill.model import GillDims
from mllm_edge.recipes.data.caption_tokens import caption_ids
from mllm_edge.recipes.data.gill_scenes import pixels
from mllm_edge.recipes.data.gill_words import Words, captioning, neighbors, shortened, stacked, telling
from mllm_edge.scenes import Scene

MODES = ("captioning", "retrieval", "generation")

Sample = dict[str, Any]


@dataclass(frozen=True)
class Batches:
    """Makes samples and batches.

    Attributes:
        dims: of the GILL.
        words: its tokenizer.
        tokenizer: of the diffusion model.
        length: most ids of a caption with BOS and the picture tokens.
    """

    dims: GillDims
    words: Words
    tokenizer: Any
    length: int

    def seen(self, scene: Scene, text: str, asked: str) -> Sample:
        """A picture, its caption, and the words that ask for it."""
        return {
            "pixel_values": pixels(scene, self.dims),
            "text": caption_ids(self.tokenizer, [text])[0],
            "caption": shortened(self.words.ids(text), self.length),
            "asked": shortened(self.words.ids(asked), self.length),
        }

    def batch(self, samples: Sequence[Sample], joined: Sequence[bool] = (False,) * len(MODES)) -> dict[str, Tensor]:
        """Pictures, `pixel_values` float32 [B,3,S,S]; their captions for the diffusion model, `text` int64 [B,L]; ids
        and labels of each mode, int64 [n,T] (`captioning`, `captioning_labels`, ...), where it is `joined` of
        neighbors in one sequence."""
        made = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in ("pixel_values", "text")}
        for mode, pairs in zip(MODES, joined, strict=True):
            if mode == "captioning":
                told = [
                    captioning(group, self.dims.rows) for group in neighbors([s["caption"] for s in samples], pairs)
                ]
            else:
                told = [telling(group, self.dims.start) for group in neighbors([s["asked"] for s in samples], pairs)]
            made[mode], made[f"{mode}_labels"] = stacked(told)
        return made

    def empty(self) -> Tensor:
        """No text, as the diffusion model reads it: int64 [1,L]."""
        return torch.from_numpy(caption_ids(self.tokenizer, [""]))
