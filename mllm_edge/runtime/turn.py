"""One question and all that becomes known of it: the only thing that is handed around."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from mllm_edge.runtime.boxes import Box
from mllm_edge.runtime.engines.interface import Array, Floats

if TYPE_CHECKING:
    from mllm_edge.bundle.manifest import TensorSpec
    from mllm_edge.progress import Report
    from mllm_edge.runtime.answers.index import Index
    from mllm_edge.runtime.decoding.tokenizers import Tokenizer

Need = Callable[[str], Array]  # `tensors.need` bound to a turn


@dataclass(frozen=True)
class InputPicture:
    """An RGB picture, named by the hash of its pixels."""

    key: str
    image: Image.Image


@dataclass(frozen=True)
class Rows:
    """Embeddings float32 [N,D] that stand in a prompt in place of "pixels", "boxes" or a "constant"; equal keys mean
    equal embeddings."""

    key: Hashable
    embeds: Floats
    of: str


class Ranking(NamedTuple):
    """How near a picture is to what an answer's groups look for: their source, the tensor [1,d] that they look by, and
    what makes a picture's own vector [d]; neither has length 1."""

    states: str
    query: str
    embed: Callable[[Image.Image], Floats]


@dataclass(frozen=True)
class Drawing:
    """How to generate or look for pictures; None takes the bundle's default.

    Attributes:
        steps: of the diffusion.
        guidance: a scale for each condition.
        seed: of the noise, 0 to 2**64 - 1.
        index: where retrieved pictures come from.
        count: how many pictures are drawn for each that is wanted, the likest to the query first.
        schedule: one of `runtime.diffusion.schedules`, "" for the bundle's.
        report: told of each picture, and of the part of its steps that is done.
        preview: given each picture as it looks after every `every` steps, which costs a decoding.
        every: see `preview`.
    """

    steps: int | None = None
    guidance: Sequence[float] | None = None
    seed: int = 0
    index: Index | None = None
    schedule: str = ""
    count: int = 1
    report: Report | None = None
    preview: Callable[[Image.Image], None] | None = None
    every: int = 0


@dataclass
class Turn:
    """A question, and what is known of its answer so far.

    Attributes:
        question: the user's words.
        picture: the one that is looked at, the dialogue's last.
        boxes: in pixels of that picture.
        task: one of the bundle's, "" where it has none.
        tags: the prompt's words that name what is in the picture, None before they are known.
        drawing: how to make pictures.
        timings: milliseconds by part; they are added up here.
        text: the answer's, as it is shown.
        ids: tokens of the answer's text.
        strip: whether white space before the answer's first word was dropped.
        states: hidden states [D] by the source that asks for them.
        marks: the control strings at which states are read, by the source that asks for them.
        added: control strings after which a space before punctuation is dropped.
        inputs: what each of the bundle's stages reads, by the stage's name.
        ranking: how drawn pictures are compared, where the bundle can.
        values: tensors that were made for this turn alone, or put in place of others.
    """

    question: str
    picture: InputPicture | None
    tokenizer: Tokenizer
    boxes: list[Box] = field(default_factory=list)
    task: str = ""
    tags: list[str] | None = None
    drawing: Drawing = field(default_factory=Drawing)
    timings: dict[str, float] = field(default_factory=dict)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    strip: bool = True
    states: dict[str, list[Floats]] = field(default_factory=dict)
    marks: Mapping[str, Sequence[str]] = field(default_factory=dict)
    added: Sequence[str] = ()
    inputs: Mapping[str, Sequence[TensorSpec]] = field(default_factory=dict)
    ranking: Ranking | None = None
    values: dict[str, Array] = field(default_factory=dict)

    def add_time(self, name: str, milliseconds: float) -> None:
        """Add to a part's time."""
        self.timings[name] = self.timings.get(name, 0.0) + milliseconds
