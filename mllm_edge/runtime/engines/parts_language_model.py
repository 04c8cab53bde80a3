"""A language model as ONNX graphs, causal or an encoder-decoder, each run by the engine that the manifest says.

The manifest's `language_model.parts`, and the tensors that they read and return (B sequences, S positions of the
prompt, T tokens, a cache of C positions):

- `embed`: `ids` int64 [B,T] -> `embeds` [B,T,D]
- `encoder` (of an encoder-decoder): `embeds` [1,S,D] -> `cross_*`: keys and values of the prompt, which all sequences
  share, [1,...]
- `decoder`: `embeds` [B,T,D], `length` int64 [1], every `cross_*`, every `past_*` [B,heads,C,d], whose first `length`
  positions count -> `logits` [B,V] of the last token, `hidden` [B,T,D], and for every `past_*` a `new_*` [B,heads,T,d]

So the caches stay where they are, on the host or on a GPU, and a step writes its own positions into them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from mllm_edge.bundle.manifest import LanguageModelEntry, StageEntry, TensorSpec
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.engines.interface import Array, Floats, Options, Stage, Step

PARTS = {"causal": {"embed", "decoder"}, "seq2seq": {"embed", "encoder", "decoder"}}
PAST, NEW, CROSS = "past_", "new_", "cross_"
BATCH = 256  # tokens of a prompt that are read at once: scores of all their pairs are held
SMALLEST = 128  # positions of a cache, which doubles when it is full


class Decoder(Protocol):
    """The decoder with its caches. It holds as many sequences as it was last given, at first none."""

    @property
    def sequences(self) -> int: ...

    def begin(self, cross: Mapping[str, Array]) -> None:
        """Take the keys and values of another prompt of an encoder-decoder; of several sequences none is kept."""
        ...

    def step(self, embeds: Floats, length: int, most: int) -> tuple[Floats, Floats]:
        """Read `embeds` [B,T,D] after the first `length` positions of the caches, which grow to `most` at most.

        Returns:
            Logits [B,V] of the last token and hidden states [B,T,D], which the next step may overwrite.
        """
        ...

    def branch(self, parents: Sequence[int], length: int) -> None:
        """Sequence b becomes what sequence `parents[b]` was, in its first `length` positions."""
        ...

    def about(self) -> str:
        """The engine and where it runs."""
        ...

    def close(self) -> None:
        """Free the engine and the caches."""
        ...


class PartsLanguageModel:
    """See `interface.Beams`. An encoder looks both ways, so of a prompt that one has read nothing is kept for the next.

    Args:
        spec: the language model.
        options: how it is to run.
        stage: opens a part.
        decoder: opens the decoder.

    Raises:
        BadInput: parts or tensors are missing, or a graph is not what the manifest says.
        MissingPackage: an engine's package is not installed.
    """

    def __init__(
        self,
        spec: LanguageModelEntry,
        options: Options,
        stage: Callable[[StageEntry], Stage],
        decoder: Callable[[StageEntry], Decoder],
    ):
        entries = {part.name: part for part in spec.parts}
        if set(entries) != PARTS[spec.kind]:
            wanted = ", ".join(sorted(PARTS[spec.kind]))
            raise BadInput(f"the language model has {', '.join(entries)}, not {wanted}; export the bundle again")
        self.context, self.vocabulary, self.width = options.context, spec.vocabulary, spec.width
        self.keeps = spec.kind == "causal"
        self._start = spec.start or 0
        _check(entries)
        self._stages = {name: stage(entry) for name, entry in entries.items() if name != "decoder"}
        self._decoder = decoder(entries["decoder"])
        self._length = 0
        self._read = self.keeps  # whether there is something to continue

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows of the embedding table, float32 [T,D]. Raises MllmEdgeError for an unknown token."""
        if not len(ids):
            return np.zeros((0, self.width), np.float32)
        return self._rows([ids])[0]

    def prefill(self, embeds: Floats, keep: int = 0, state: bool = False) -> Step:
        """Read a prompt [T,D] after the first `keep` positions; an encoder-decoder encodes it whole, and is fed the
        token that every answer starts with.

        Raises:
            MllmEdgeError: the prompt is empty, of another width, or longer than the context.
        """
        room = self.context - keep
        if embeds.ndim != 2 or embeds.shape[1] != self.width or not 0 < len(embeds) <= room or keep > self._length:
            raise MllmEdgeError(
                f"the language model takes embeddings [T,{self.width}], T up to {room}; got {embeds.shape}"
            )
        embeds, cross = np.ascontiguousarray(embeds, np.float32), dict[str, Array]()
        if not self.keeps:
            cross = self._stages["encoder"](embeds=embeds[None])
            embeds, keep = self.embed([self._start]), 0
        self._decoder.begin(cross)
        self._length, self._read = keep, True
        for first in range(0, len(embeds), BATCH):
            outputs = self._feed(embeds[None, first : first + BATCH])
        return _step(outputs, int(state))

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        """Append tokens. Raises MllmEdgeError when the context is full, a token unknown, or several beams are held."""
        return _step(self._feed(self._rows([ids])), states)

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> Floats:
        """See `interface.Beams`. Raises MllmEdgeError as `extend`."""
        self._decoder.branch(parents, self._length)
        logits, _ = self._feed(self._rows([[token] for token in tokens]))
        return logits.copy()  # [B,V]

    def about(self) -> str:
        """The decoder's engine."""
        return self._decoder.about()

    def close(self) -> None:
        """Free the graphs and the caches."""
        self._decoder.close()
        for stage in self._stages.values():
            stage.close()
        self._read = False

    def _feed(self, embeds: Floats) -> tuple[Floats, Floats]:
        """Run the decoder on embeddings [B,T,D] after what the caches hold, which grow by them."""
        if not self._read:
            raise MllmEdgeError("the language model has read no prompt, or is closed; read one first")
        sequences, tokens, _ = embeds.shape
        if self._decoder.sequences not in (0, sequences):
            raise MllmEdgeError("several sequences are held after a beam search; read the prompt again")
        most = self.context + (not self.keeps)  # the start token is no token of the answer
        if self._length + tokens > most:
            raise MllmEdgeError(f"{self._length} tokens fill the context of {self.context}; load a larger one")
        outputs = self._decoder.step(embeds, self._length, most)
        self._length += tokens
        return outputs

    def _rows(self, ids: Sequence[Sequence[int]]) -> Floats:
        """Embeddings [B,T,D] of ids [B][T]."""
        array = np.array(ids, np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocabulary:
            raise MllmEdgeError(f"token ids must be below {self.vocabulary}; got {array.min()} to {array.max()}")
        rows: Floats = self._stages["embed"](ids=array)["embeds"]
        return rows


def grown(held: int, positions: int, most: int) -> int:
    """The positions of a cache that must hold so many and holds `held`."""
    return held if held >= positions else min(most, max(positions, 2 * held, SMALLEST))


def sized(spec: TensorSpec, sequences: int, positions: int) -> tuple[int, ...]:
    """A shape whose first axis, if it is named, are the sequences, and another named one the positions."""
    first, *others = spec.shape
    lengths = [positions if isinstance(size, str) else size for size in others]
    return (sequences if isinstance(first, str) else first, *lengths)


def _check(entries: Mapping[str, StageEntry]) -> None:
    """Raises BadInput where the decoder lacks a tensor, or nothing gives what it reads of the prompt."""
    decoder = entries["decoder"]
    inputs, outputs = ({tensor.name for tensor in tensors} for tensors in (decoder.inputs, decoder.outputs))
    past, crossed = ({name for name in inputs if name.startswith(kind)} for kind in (PAST, CROSS))
    given = outputs | {t.name for name, part in entries.items() if name == "encoder" for t in part.outputs}
    wanted = crossed | {"logits", "hidden"} | {name.replace(PAST, NEW, 1) for name in past}
    lacking = sorted((wanted - given) | ({"embeds", "length"} - inputs))
    if lacking or not past:
        raise BadInput(f"{decoder.file} lacks {', '.join(lacking) or PAST + '*'}; export it again")
    for spec in (one for one in decoder.inputs if one.name in past):
        if [isinstance(size, str) for size in spec.shape[1:]] != [False, True, False]:
            raise BadInput(f"{decoder.file} has a cache {spec.name} {spec.shape}; it can be [B,heads,C,d]")


def _step(outputs: tuple[Floats, Floats], states: int) -> Step:
    logits, hidden = outputs
    last = hidden[0]  # [T,D]
    return Step(logits[0].copy(), last[len(last) - states :].copy())
