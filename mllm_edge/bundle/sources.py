"""Sources of the manifest: where an input comes from that no stage gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle, by its path relative to the bundle's folder."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Pixels:
    """The picture as float32 [1,3,size,size].

    It is turned to RGB; `fit` is "pad" (centered on a square of color `pad_color`, then resized), "crop" (shortest edge
    resized to `size`, then the center is cut out), "longest" (longest edge resized to `size`, then zeros on the right
    and below) or "squash" (resized to the square whatever its shape). `mean` and `std` apply to values in 0..1.
    """

    name: str
    size: int
    fit: str
    resample: str
    pad_color: list[int]
    mean: list[float]
    std: list[float]
    kind: Literal["pixels"] = "pixels"


@dataclass(frozen=True)
class Boxes:
    """The user's boxes as float32 [n,4]: x1,y1,x2,y2 in 0..1 of the picture."""

    name: str
    kind: Literal["boxes"] = "boxes"


@dataclass(frozen=True)
class Text:
    """The user's question as int64 [1,length], by one of the bundle's tokenizers.

    `cut` is the side where a longer text loses tokens, "left" or "right"; a shorter one is padded on the right with
    `pad`.
    """

    name: str
    tokenizer: str
    length: int
    cut: str = "right"
    pad: int = 0
    kind: Literal["text"] = "text"


@dataclass(frozen=True)
class Task:
    """The chosen task as int64 [1]: one of `values`. By default the first of `cues` (by task) that has words which
    occur in the question, upper or lower case, else the first of `values`."""

    name: str
    values: dict[str, int]
    cues: dict[str, list[str]] = field(default_factory=dict)
    kind: Literal["task"] = "task"


@dataclass(frozen=True)
class Constant:
    """An array of the bundle, a .npy file."""

    name: str
    file: FileEntry
    kind: Literal["constant"] = "constant"


@dataclass(frozen=True)
class Labels:
    """Words for `{field}` of the template: those of `names` whose value in `tensor` ([1,n]) is above its threshold,
    with `joint` between. Where nothing gives the tensor, `around`, the part of the template that has the field, is left
    out."""

    field: str
    tensor: str
    names: list[str]
    thresholds: list[float]
    joint: str = ", "
    around: str = ""
    kind: Literal["labels"] = "labels"


@dataclass(frozen=True)
class States:
    """Hidden states of the language model (after its final norm), float32 [n,width]: one for each of `tokens` in the
    answer. `at` is "before", the state that predicts the token, or "token", the state at the token itself."""

    name: str
    tokens: list[str]
    at: str = "before"
    kind: Literal["states"] = "states"


Source = Pixels | Boxes | Text | Task | Constant | Labels | States
