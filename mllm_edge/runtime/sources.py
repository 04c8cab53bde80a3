"""Sources of a bundle as arrays: one reader a kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.sources import Boxes, Constant, Pixels, States, Task, Text
from mllm_edge.errors import BadInput
from mllm_edge.runtime.boxes import normalized
from mllm_edge.runtime.decoding.tokenizers import Tokenizer
from mllm_edge.runtime.engines.interface import Array
from mllm_edge.runtime.preprocess import preprocess
from mllm_edge.runtime.turn import Turn


@dataclass(frozen=True)
class Held:
    """What readers need beside the turn: the bundle's folder and its tokenizers."""

    folder: Path
    tokenizers: Mapping[str, Tokenizer]


def pixels(source: Pixels, turn: Turn, held: Held) -> Array:
    """float32 [1,3,S,S]. Raises BadInput without a picture."""
    if turn.picture is None:
        raise BadInput("this question needs a picture; give one (--image)")
    return preprocess(turn.picture.image, source)


def boxes(source: Boxes, turn: Turn, held: Held) -> Array:
    """float32 [n,4]. Raises BadInput without a picture."""
    if turn.picture is None:
        raise BadInput("boxes were given but no picture; give the picture that they are of")
    return normalized(turn.boxes, turn.picture.image.size)


def text(source: Text, turn: Turn, held: Held) -> Array:
    """int64 [1,length]: see `question_ids`."""
    return question_ids(source, held.tokenizers[source.tokenizer], turn.question)


def question_ids(source: Text, tokenizer: Tokenizer, question: str) -> Array:
    """int64 [1,length]: the question's ids, with BOS and an end where the tokenizer has them, cut and padded."""
    before, after = ([] if one is None else [one] for one in (tokenizer.bos, tokenizer.eos))
    room = max(0, source.length - len(before) - len(after))
    ids = tokenizer.tokenize(question)
    ids = ids[:room] if source.cut == "right" else ids[max(0, len(ids) - room) :]
    ids = [*before, *ids, *after][: source.length]
    return np.array([ids + [source.pad] * (source.length - len(ids))], np.int64)


def task(source: Task, turn: Turn, held: Held) -> Array:
    """int64 [1]. Raises BadInput for a task that the bundle has not."""
    name = turn.task or next(iter(source.values))
    if name not in source.values:
        raise BadInput(f"there is no task {name!r}; this bundle has {', '.join(source.values)}")
    return np.array([source.values[name]], np.int64)


def constant(source: Constant, held: Held) -> Array:
    """The array, mapped. Raises BadInput where the file is none."""
    path = locate(held.folder, source.file.file)
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BadInput(f"{path} is no array ({error}); export the bundle again") from None
    return array


def states(source: States, turn: Turn, held: Held) -> Array:
    """float32 [n,D], in the order of the answer. Raises BadInput where the answer has none."""
    if not turn.states.get(source.name):
        raise BadInput(f"the answer has no {', '.join(source.tokens)}, which {source.name} is read at; ask for one")
    return np.stack(turn.states[source.name])  # n x [D] -> [n,D]


READERS: dict[str, Callable[[Any, Turn, Held], Array]] = {
    "pixels": pixels,
    "boxes": boxes,
    "text": text,
    "task": task,
    "constant": lambda source, turn, held: constant(source, held),
    "states": states,
}
