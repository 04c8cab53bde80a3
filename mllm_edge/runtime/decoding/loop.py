"""The pipeline for text answers: prefill what is new, then step until the model or a stop string ends the answer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mllm_edge.bundle.manifest import Generation
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.decoding.sampling import Sampler
from mllm_edge.runtime.decoding.text_stream import TextStream
from mllm_edge.runtime.engines.interface import Floats, LanguageModel, Step
from mllm_edge.runtime.engines.lazy import LazyLanguageModel
from mllm_edge.runtime.tensors import Picture

Script = list[list[int] | Picture]  # a dialogue as the model reads it: runs of token ids, and pictures
Key = int | tuple[str, int]  # what stands at a position: a token id, or a row of a picture


@dataclass(frozen=True)
class Decoding:
    """How to decode one answer: the settings, a seed, stop strings, whether leading white space is dropped, and behind
    which control tokens a space before punctuation is."""

    settings: Generation
    seed: int
    stop: Sequence[str]
    strip: bool
    added: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Watch:
    """A token that other stages wait for. The state that foretells it is kept, and `found` is called when it comes."""

    token: int
    found: Callable[[], None]


@dataclass(frozen=True)
class Completion:
    """An answer's text and ids, and the ids that stand for it in a dialogue that goes on.

    `kept` are the ids that make up the text (no end token, no stop string). Where a token spans the end of the text,
    `rest` is its part that belongs to it. `tail` is what was generated after the text: a stop string, or nothing.
    `states` are those that foretold a watched token of the text, float32 [D] each; `strip` says whether white space
    before the first word was dropped.
    """

    text: str
    ids: list[int]
    kept: list[int]
    rest: str
    tail: str
    timings: dict[str, float]
    states: list[Floats] = field(default_factory=list)
    strip: bool = True


def script_keys(script: Script) -> list[Key]:
    """One key per position; equal keys mean equal embeddings."""
    keys: list[Key] = []
    for part in script:
        keys += [(part.key, row) for row in range(len(part.embeds))] if isinstance(part, Picture) else part
    return keys


def script_embeds(script: Script, language_model: LanguageModel, start: int = 0) -> Floats:
    """Embeddings float32 [T-start,D] of the script's positions from `start` on."""
    rows: list[Floats] = []
    for part in script:
        size = len(part.embeds) if isinstance(part, Picture) else len(part)
        if start < size:
            part_rows = part.embeds[start:] if isinstance(part, Picture) else language_model.embed(part[start:])
            rows.append(part_rows)
        start = max(0, start - size)
    return np.concatenate(rows) if rows else np.zeros((0, language_model.width), np.float32)


class TextPipeline:
    """Decodes with one language model, whose KV cache keeps the last dialogue: a common beginning is not read again."""

    def __init__(self, language_model: LanguageModel):
        self._model = language_model
        self._keys: list[Key] = []  # what is known to stand in the KV cache
        self._running = 0

    def forget(self) -> None:
        """Let a language model go that can be loaded again; what the KV cache held is read anew."""
        if isinstance(self._model, LazyLanguageModel):
            self._model.release()
            self._keys = []

    def fit(self, positions: int, image_positions: int, max_tokens: int, largest_context: int) -> int:
        """How many tokens may be generated: `max_tokens`, or what the context leaves, with a warning.

        Raises:
            BadInput: the prompt alone does not fit.
        """
        context = self._model.context
        room = context - positions
        if room < 1:
            larger = f", or load with a context of up to {largest_context}" if largest_context > context else ""
            raise BadInput(
                f"the prompt takes {positions} positions ({image_positions} of them for pictures) but the context has "
                f"{context} and the answer needs at least one; shorten it or give fewer pictures{larger}"
            )
        if max_tokens > room:
            warnings.warn(
                f"the prompt leaves {room} of the context's {context} positions, so at most {room} tokens are "
                f"generated instead of {max_tokens}",
                RuntimeWarning,
                stacklevel=2,
            )
        return min(max_tokens, room)

    def stream(self, script: Script, decoding: Decoding, watch: Watch | None = None) -> Iterator[str | Completion]:
        """Pieces of the answer as they become certain; the last item is the `Completion`.

        Raises:
            MllmEdgeError: another answer was begun with this model before this one was finished.
        """
        self._running += 1
        turn = self._running
        stream = TextStream(decoding.stop, decoding.strip)
        sampler = Sampler(decoding.settings, decoding.seed)
        ids: list[int] = []
        ends: list[int] = []  # bytes of text after each token
        states: list[Floats] = []
        self._model.want_hidden = watch is not None
        start = time.perf_counter()
        seen = self._prefill(script)
        prefilled = time.perf_counter()
        waited = 0.0  # time that the caller spent between two pieces
        while True:
            token = sampler.sample(seen.logits)
            ids.append(token)
            if watch is not None and token == watch.token and seen.hidden is not None:
                states.append(seen.hidden)
                watch.found()
            if self._model.is_end(token):
                break
            data = self._model.piece(token)
            ends.append((ends[-1] if ends else 0) + len(data))
            if shown := stream.feed(data, joined=len(ids) > 1 and ids[-2] in decoding.added):
                paused = time.perf_counter()
                yield shown
                waited += time.perf_counter() - paused
            if stream.stopped or len(ids) == decoding.settings.max_tokens:
                break
            if turn != self._running:
                raise MllmEdgeError("this answer was interrupted by a newer one; finish an answer before the next")
            seen = self._model.step(token)
            self._keys.append(token)
        if shown := stream.finish():
            yield shown
        decoded = 1000 * (time.perf_counter() - prefilled - waited)
        completion = self._complete(stream, ids, ends, {"prefill": 1000 * (prefilled - start), "decode": decoded})
        told = completion.kept.count(watch.token) if watch else 0  # a stop string may take some away
        yield replace(completion, states=states[:told], strip=decoding.strip)

    def forced(self, script: Script, ids: list[int], decoding: Decoding, watch: Watch) -> Completion:
        """An answer that is given (teacher forcing): read `ids` and keep what foretells the watched token."""
        self._running += 1
        self._model.want_hidden = True
        start = time.perf_counter()
        states: list[Floats] = []
        for at in [at for at, token in enumerate(ids) if token == watch.token]:
            hidden = self._prefill([*script, ids[:at]]).hidden
            if hidden is not None:
                states.append(hidden)
                watch.found()
        text = TextStream((), decoding.strip)
        for before, token in zip([None, *ids], ids):
            text.feed(self._model.piece(token), joined=before in decoding.added)
        text.finish()
        timings = {"prefill": 1000 * (time.perf_counter() - start), "decode": 0.0}
        return Completion(text.text, ids, ids, "", "", timings, states, decoding.strip)

    def _complete(self, stream: TextStream, ids: list[int], ends: list[int], timings: dict[str, float]) -> Completion:
        whole = sum(end <= stream.size for end in ends)
        beyond = b"".join(self._model.piece(token) for token in ids[whole : len(ends)])
        split = stream.size - (ends[whole - 1] if whole else 0)
        rest, tail = (part.decode("utf-8", "replace") for part in (beyond[:split], beyond[split:]))
        return Completion(stream.text, ids, ids[:whole], rest, tail, timings)

    def _prefill(self, script: Script) -> Step:
        """Rewind to what the KV cache already has of the script and read the rest; the step of its last position."""
        keys = script_keys(script)
        keep = min(_common(self._keys, keys), len(keys) - 1)  # the last one again: its logits are needed
        self._keys = keys[:keep]  # should the prefill be interrupted, no more than this is sure to be there
        step = self._model.prefill(script_embeds(script, self._model, keep), keep)
        self._keys = keys
        return step


def settings_for(defaults: Generation, **given: float | None) -> Generation:
    """The bundle's defaults with the caller's values in place of those that are not None."""
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _common(old: Sequence[Key], new: Sequence[Key]) -> int:
    pairs = enumerate(zip(old, new))
    return next((at for at, (a, b) in pairs if a != b), min(len(old), len(new)))
