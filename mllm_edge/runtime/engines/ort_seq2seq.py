"""An encoder-decoder language model as three ONNX graphs, run by ONNX Runtime.

The manifest's `language_model.parts`, and the tensors that they read and return (B sequences, S positions of the
prompt, T tokens, P positions before):

- `embed`: `ids` int64 [B,T] -> `embeds` [B,T,D]
- `encoder`: `embeds` [1,S,D] -> `cross_*`: keys and values of the prompt, which all sequences share, [1,...]
- `decoder`: `ids` int64 [B,T], every `cross_*`, every `past_*` [B,heads,P,d] -> `logits` [B,T,V], `hidden` [B,T,D],
  and for every `past_*` a `present_*` [B,heads,P+T,d]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mllm_edge.bundle.check import locate
from mllm_edge.bundle.manifest import LanguageModelEntry
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.machine.facts import version
from mllm_edge.runtime.engines.interface import Array, Floats, Options, Step
from mllm_edge.runtime.engines.ort import OnnxStage

PARTS = ("embed", "encoder", "decoder")
PAST, PRESENT, CROSS = "past_", "present_", "cross_"


class OrtSeq2Seq:
    """See `interface.Beams`. Its encoder looks both ways, so nothing of a prompt is kept for the next.

    Raises:
        BadInput: parts or tensors are missing, or a graph is not what the manifest says.
        MissingPackage: onnxruntime is not installed.
    """

    keeps = False

    def __init__(self, folder: Path, spec: LanguageModelEntry, options: Options):
        entries = {part.name: part for part in spec.parts}
        if set(entries) != set(PARTS) or spec.start is None:
            raise BadInput(
                f"the language model has {', '.join(entries)}, not {', '.join(PARTS)}; export the bundle again"
            )
        self.context, self.vocabulary, self.width, self._start = (
            options.context,
            spec.vocabulary,
            spec.width,
            spec.start,
        )
        decoder = entries["decoder"]
        inputs = {tensor.name: tensor for tensor in decoder.inputs}
        self._past = {name: tensor for name, tensor in inputs.items() if name.startswith(PAST)}
        given = {tensor.name for tensor in (*entries["encoder"].outputs, *decoder.outputs)}
        wanted = {name for name in inputs if name.startswith(CROSS)} | {"logits", "hidden"}
        wanted |= {name.replace(PAST, PRESENT, 1) for name in self._past}
        if wanted - given or "ids" not in inputs or not self._past:
            raise BadInput(
                f"{decoder.file} lacks {', '.join(sorted(wanted - given)) or 'ids or past'}; export it again"
            )
        self._parts = {name: OnnxStage(locate(folder, entry.file), entry, options) for name, entry in entries.items()}
        self._cross: dict[str, Array] = {}
        self._cache: dict[str, Array] = {}
        self._length = 0

    def embed(self, ids: Sequence[int]) -> Floats:
        """Rows of the embedding table, float32 [T,D]. Raises MllmEdgeError for an unknown token."""
        if not len(ids):
            return np.zeros((0, self.width), np.float32)
        embeds: Floats = self._parts["embed"](ids=self._rows([ids]))["embeds"][0]
        return embeds

    def prefill(self, embeds: Floats, keep: int = 0, state: bool = False) -> Step:
        """Encode a prompt [S,D] and feed the token that every answer starts with.

        Raises:
            MllmEdgeError: a wrong shape, more positions than the context has, or `keep`, which is not possible.
        """
        if embeds.ndim != 2 or embeds.shape[1] != self.width or not 0 < len(embeds) <= self.context or keep:
            raise MllmEdgeError(
                f"the language model takes embeddings [S,{self.width}], S up to {self.context}; got {embeds.shape}"
            )
        outputs = self._parts["encoder"](embeds=embeds[None].astype(np.float32, copy=False))
        self._cross = {name: array for name, array in outputs.items() if name.startswith(CROSS)}
        self._length = 0
        self._cache = {name: self._empty(tensor.shape, tensor.dtype) for name, tensor in self._past.items()}
        return self._step([[self._start]], int(state))

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        """Append tokens. Raises MllmEdgeError when the context is full, a token unknown, or several beams are held."""
        return self._step([ids], states)

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> Floats:
        """See `interface.Beams`. Raises MllmEdgeError as `extend`."""
        order = np.asarray(parents, np.int64)
        self._cache = {name: array[order] for name, array in self._cache.items()}
        logits: Floats = self._feed([[token] for token in tokens])["logits"][:, -1]  # [B,1,V] -> [B,V]
        return logits

    def about(self) -> str:
        """ONNX Runtime's version and provider."""
        package = next((name for name in ("onnxruntime", "onnxruntime-gpu") if version(name)), "onnxruntime")
        return f"{package} {version(package)}, {self._parts['decoder'].provider}"

    def close(self) -> None:
        """Free the graphs and the caches."""
        for part in self._parts.values():
            part.close()
        self._cache, self._cross = {}, {}

    def _step(self, rows: Sequence[Sequence[int]], states: int) -> Step:
        outputs = self._feed(rows)
        hidden = outputs["hidden"][0]  # [T,D]
        return Step(outputs["logits"][0, -1], hidden[len(hidden) - states :])

    def _feed(self, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
        """Run the decoder on tokens [B][T] after what the caches hold, which grow by them."""
        if not self._cross:
            raise MllmEdgeError("the language model has read no prompt, or is closed; read one first")
        ids = self._rows(rows)  # [B,T]
        if self._length + ids.shape[1] > self.context + 1:  # the start token is no token of the answer
            raise MllmEdgeError(f"{self._length} tokens fill the context of {self.context}; load a larger one")
        outputs = self._parts["decoder"](ids=ids, **self._cross, **self._cache)
        self._length += ids.shape[1]
        self._cache = {name: outputs[name.replace(PAST, PRESENT, 1)] for name in self._past}
        return outputs

    def _rows(self, rows: Sequence[Sequence[int]]) -> Array:
        ids = np.array(rows, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise MllmEdgeError(f"token ids must be below {self.vocabulary}; got {ids.min()} to {ids.max()}")
        return ids

    @staticmethod
    def _empty(shape: Sequence[int | str], dtype: str) -> Array:
        """A cache of no positions: its first axis is the sequences, of which there is one, the other named one is P."""
        return np.zeros([1, *(0 if isinstance(size, str) else size for size in shape[1:])], dtype)
