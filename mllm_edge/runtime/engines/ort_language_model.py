"""A language model as ONNX graphs, run by ONNX Runtime: causal, or an encoder-decoder.

The manifest's `language_model.parts`, and the tensors that they read and return (B sequences, S positions of the
prompt, T tokens, a cache of C positions):

- `embed`: `ids` int64 [B,T] -> `embeds` [B,T,D]
- `encoder` (of an encoder-decoder): `embeds` [1,S,D] -> `cross_*`: keys and values of the prompt, which all sequences
  share, [1,...]
- `decoder`: `embeds` [B,T,D], `length` int64 [1], every `cross_*`, every `past_*` [B,heads,C,d], whose first `length`
  positions count -> `logits` [B,V] of the last token, `hidden` [B,T,D], and for every `past_*` a `new_*` [B,heads,T,d]

So the caches stay where they are, and a step writes its own positions into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import LanguageModelEntry, TensorSpec
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.machine.facts import version
from mllm_edge.runtime.engines.interface import Array, Floats, Options, Step
from mllm_edge.runtime.engines.ort import Binding, OnnxStage

PARTS = {"causal": {"embed", "decoder"}, "seq2seq": {"embed", "encoder", "decoder"}}
PAST, NEW, CROSS = "past_", "new_", "cross_"
BATCH = 256  # tokens of a prompt that are read at once: scores of all their pairs are held
SMALLEST = 128  # positions of a cache, which doubles when it is full


class OrtLanguageModel:
    """See `interface.Beams`. An encoder looks both ways, so of a prompt that one has read nothing is kept for the next.

    Raises:
        BadInput: parts or tensors are missing, or a graph is not what the manifest says.
        MissingPackage: onnxruntime is not installed.
    """

    def __init__(self, folder: Path, spec: LanguageModelEntry, options: Options):
        entries = {part.name: part for part in spec.parts}
        if set(entries) != PARTS[spec.kind]:
            wanted = ", ".join(sorted(PARTS[spec.kind]))
            raise BadInput(f"the language model has {', '.join(entries)}, not {wanted}; export the bundle again")
        self.context, self.vocabulary, self.width = options.context, spec.vocabulary, spec.width
        self.keeps = spec.kind == "causal"
        self._start = spec.start or 0
        decoder = entries["decoder"]
        inputs = {tensor.name: tensor for tensor in decoder.inputs}
        self._past = {name: tensor for name, tensor in inputs.items() if name.startswith(PAST)}
        self._crossed = {name for name in inputs if name.startswith(CROSS)}
        outputs = {tensor.name for tensor in decoder.outputs}
        given = outputs | {t.name for part in entries.values() if part.name == "encoder" for t in part.outputs}
        wanted_from = self._crossed | {"logits", "hidden"} | {name.replace(PAST, NEW, 1) for name in self._past}
        lacking = sorted((wanted_from - given) | ({"embeds", "length"} - set(inputs)))
        if lacking or not self._past:
            raise BadInput(f"{decoder.file} lacks {', '.join(lacking) or PAST + '*'}; export it again")
        self._parts = {name: OnnxStage(locate(folder, entry.file), entry, options) for name, entry in entries.items()}
        self._decoder = Binding(self._parts["decoder"])
        self._cross: dict[str, Array] = {}
        self._cache: dict[str, Array] = {}
        self._fed: dict[str, Array] = {}
        self._given: dict[str, Array] = {}
        self._length = 0
        self._read = self.keeps  # whether there is something to continue
        self._bound: tuple[int, ...] = ()

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
        embeds = np.ascontiguousarray(embeds, np.float32)
        if not self.keeps:
            outputs = self._parts["encoder"](embeds=embeds[None])
            self._cross = {name: array for name, array in outputs.items() if name in self._crossed}
            embeds, keep = self.embed([self._start]), 0
        if self._cache and len(next(iter(self._cache.values()))) > 1:  # beams of the answer before
            self._cache = {}
        self._length, self._read, self._bound = keep, True, ()
        for first in range(0, len(embeds), BATCH):
            outputs = self._feed(embeds[None, first : first + BATCH])
        return _step(outputs, int(state))

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        """Append tokens. Raises MllmEdgeError when the context is full, a token unknown, or several beams are held."""
        return _step(self._feed(self._rows([ids])), states)

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> Floats:
        """See `interface.Beams`. Raises MllmEdgeError as `extend`."""
        order = np.asarray(parents, np.int64)
        for name, array in self._cache.items():
            if len(array) != len(order):
                self._cache[name], self._bound = array[order], ()
            elif (order != np.arange(len(order))).any():
                array[:, :, : self._length] = array[order, :, : self._length]
        logits: Floats = self._feed(self._rows([[token] for token in tokens]))["logits"]
        return logits.copy()  # [B,V]

    def about(self) -> str:
        """ONNX Runtime's version and provider."""
        package = next((name for name in ("onnxruntime", "onnxruntime-gpu") if version(name)), "onnxruntime")
        return f"{package} {version(package)}, {self._parts['decoder'].provider}"

    def close(self) -> None:
        """Free the graphs and the caches."""
        self._decoder.close()
        for part in self._parts.values():
            part.close()
        self._cache, self._cross, self._read = {}, {}, False

    def _feed(self, embeds: Floats) -> dict[str, Array]:
        """Run the decoder on embeddings [B,T,D] after what the caches hold, which grow by them."""
        if not self._read:
            raise MllmEdgeError("the language model has read no prompt, or is closed; read one first")
        sequences, tokens, _ = embeds.shape
        if self._cache and len(next(iter(self._cache.values()))) != sequences:
            raise MllmEdgeError("several sequences are held after a beam search; read the prompt again")
        most = self.context + (not self.keeps)  # the start token is no token of the answer
        if self._length + tokens > most:
            raise MllmEdgeError(f"{self._length} tokens fill the context of {self.context}; load a larger one")
        self._grow(sequences, self._length + tokens, most)
        # An empty cache is as short as can be, so that nothing is multiplied with what does not count.
        first = self._length == 0
        shape = (sequences, tokens, 1 if first else next(iter(self._cache.values())).shape[2])
        if self._bound != shape:
            self._bind(*shape)
        self._fed["embeds"][...], self._fed["length"][0] = embeds, self._length
        self._decoder.run()
        for name, array in self._cache.items():
            array[:, :, self._length : self._length + tokens] = self._given[name.replace(PAST, NEW, 1)]
        self._length += tokens
        return self._given

    def _grow(self, sequences: int, positions: int, most: int) -> None:
        """Caches for so many positions of each sequence."""
        held = next(iter(self._cache.values())).shape[2] if self._cache else 0
        if held >= positions:
            return
        size, before = min(most, max(positions, 2 * held, SMALLEST)), self._cache
        self._cache = {name: np.zeros(_sized(spec, sequences, size), spec.dtype) for name, spec in self._past.items()}
        for name, array in before.items():
            self._cache[name][:, :, : self._length] = array[:, :, : self._length]
        self._bound = ()

    def _bind(self, sequences: int, tokens: int, positions: int) -> None:
        """Memory for what a step of this shape reads and gives."""
        decoder = self._parts["decoder"].spec
        self._fed = {"embeds": np.empty((sequences, tokens, self.width), np.float32), "length": np.zeros(1, np.int64)}
        short = {name: np.zeros(_sized(tensor, sequences, 1), tensor.dtype) for name, tensor in self._past.items()}
        self._given = {
            spec.name: np.empty(
                (sequences, self.vocabulary) if spec.name == "logits" else _sized(spec, sequences, tokens), spec.dtype
            )
            for spec in decoder.outputs
        }
        self._decoder.bind(self._fed | self._cross | (short if self._length == 0 else self._cache), self._given)
        self._bound = (sequences, tokens, positions)

    def _rows(self, ids: Sequence[Sequence[int]]) -> Floats:
        """Embeddings [B,T,D] of ids [B][T]."""
        array = np.array(ids, np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocabulary:
            raise MllmEdgeError(f"token ids must be below {self.vocabulary}; got {array.min()} to {array.max()}")
        rows: Floats = self._parts["embed"](ids=array)["embeds"]
        return rows


def _step(outputs: dict[str, Array], states: int) -> Step:
    hidden = outputs["hidden"][0]  # [T,D]
    return Step(outputs["logits"][0].copy(), hidden[len(hidden) - states :].copy())


def _sized(spec: TensorSpec, sequences: int, positions: int) -> tuple[int, ...]:
    """A shape whose first axis is the sequences; another named one is the positions."""
    return (sequences, *(positions if isinstance(size, str) else size for size in spec.shape[1:]))
