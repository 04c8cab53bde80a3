"""Kinds of answers beside text, as the manifest describes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MasksAnswer:
    """A mask for each state of `states`: the tensor `logits` [n,h,w] covers the square that a picture's longest side
    fills with `frame` pixels. The phrase that a mask is tied to stands between the two tokens of `phrase`."""

    states: str
    logits: str
    frame: int
    phrase: list[str] = field(default_factory=list)
    kind: Literal["masks"] = "masks"


@dataclass(frozen=True)
class BoxesAnswer:
    """Boxes in the answer's text: `pattern` is a regular expression with four groups, numbers in units of
    `1 / unit` of the picture's sides with `decimals` decimals. In `tasks` an answer is one box, "[x1,y1,x2,y2]" in
    units of 1, and nothing else can be said. A question's `placeholder` stands for one of the user's boxes, in such
    words."""

    pattern: str
    decimals: int
    unit: float
    tasks: list[str] = field(default_factory=list)
    placeholder: str = ""
    kind: Literal["boxes"] = "boxes"


@dataclass(frozen=True)
class PicturesAnswer:
    """A generated picture for each group of tokens of the source `states` (none: one for every answer).

    The stage `unet` reads the tensors `latent` (of `shape`) and `timestep` and returns `noise`; the stage `vae` reads
    `decoded`, the last latent / `latent_scale`, and returns `pixels` [1,3,h,w] in -1..1. The square roots of the
    variances of the `train_steps` steps of training lie linearly between those of the two `betas`. Branch k of the
    guidance has the first k of `drops` replaced ([tensor, what stands for it]); `guidance` has a scale for each
    (`runtime/diffusion/guidance.py`). Where the first axis of the UNet's `latent` has a name, all branches are one
    batch along it, and inputs that lack the axis are the same for all. `spacing` of the timesteps "" is the schedule's
    usual. With a `decision` [1,2], logits of retrieving and of generating, nothing is drawn where the first is the
    larger and there is an index.
    """

    states: str
    unet: str
    vae: str
    latent: str
    timestep: str
    noise: str
    decoded: str
    pixels: str
    latent_scale: float
    shape: list[int]
    betas: list[float]
    train_steps: int
    drops: list[list[str]] = field(default_factory=list)
    guidance: list[float] = field(default_factory=list)
    schedule: str = "ddim"
    steps: int = 50
    spacing: str = ""
    decision: str = ""
    kind: Literal["pictures"] = "pictures"


@dataclass(frozen=True)
class RetrievedAnswer:
    """For each group of tokens of the source `states`, the picture of the user's index that is nearest to the tensor
    `query` [1,d]; `decision` [1,2], if any, holds logits of retrieving and of generating. Without an index an answer is
    refused where it is `needed`; else it is left to the other kinds.

    The tensor `picture` [n,d] stands for n pictures and is made from pixels alone (n is 1, or a named axis of all that
    leads there: then pictures are embedded in batches); without it the bundle makes no index. Stages need normalise
    neither: an index holds `picture` divided by its length, a search divides `query` by its own, and a score is their
    product, times `scale` in an answer.
    """

    states: str
    query: str
    scale: float = 1.0
    decision: str = ""
    picture: str = ""
    needed: bool = True
    kind: Literal["retrieved"] = "retrieved"


AnswerEntry = MasksAnswer | BoxesAnswer | PicturesAnswer | RetrievedAnswer
