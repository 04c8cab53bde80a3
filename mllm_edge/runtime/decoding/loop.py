"""The loop of text answers: prefill what is new, then extend until the model or a stop string ends the answer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from mllm_edge.bundle.manifest import Generation
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.runtime.decoding.beam import beam_search
from mllm_edge.runtime.decoding.rules import Rule
from mllm_edge.runtime.decoding.sampling import Sampler
from mllm_edge.runtime.decoding.text_stream import TextStream
from mllm_edge.runtime.decoding.tokenizers import Tokenizer
from mllm_edge.runtime.engines.interface import Beams, Floats, LanguageModel, Step
from mllm_edge.runtime.engines.lazy import LazyLanguageModel
from mllm_edge.runtime.turn import Rows

Script = list[list[int] | Rows]  # a dialogue as the model reads it: runs of token ids, and rows of embeddings
Key = int | tuple[Hashable, int]  # what stands at a position: a token id, or one of some rows


@dataclass(frozen=True)
class Decoding:
    """How to decode one answer.

    Attributes:
        settings: of the bundle, with the caller's in place.
        seed: of the draw.
        stop: strings that end the answer.
        strip: drop white space before the first word.
        late_stop: a stop string that opens the answer does not end it.
        added: control tokens after which a space before punctuation is dropped.
        groups: tokens that are forced after a token.
        rules: what edits logits before a token is chosen.
    """

    settings: Generation
    seed: int
    stop: Sequence[str]
    strip: bool
    added: frozenset[int] = frozenset()
    groups: Mapping[int, Sequence[int]] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    late_stop: bool = False


@dataclass(frozen=True)
class Watch:
    """Tokens whose hidden states other stages read.

    Attributes:
        before: token -> the source that reads the state that predicts it.
        at: token -> the source that reads the state at the token itself.
        found: called with the source's name when such a token comes.
    """

    before: Mapping[int, str] = field(default_factory=dict)
    at: Mapping[int, str] = field(default_factory=dict)
    found: Callable[[str], None] = lambda _: None


@dataclass(frozen=True)
class Completion:
    """An answer's text and ids, and the ids that stand for it in a dialogue that continues.

    `kept` are the ids that make up the text (no end token, no stop string). Where a token spans the end of the text,
    `rest` is its part that belongs to it. `tail` is what was generated after the text: a stop string, or nothing.
    `states` are hidden states of tokens of the text, float32 [D] each, by the source that reads them.
    """

    text: str
    ids: list[int]
    kept: list[int]
    rest: str
    tail: str
    timings: dict[str, float]
    states: dict[str, list[Floats]] = field(default_factory=dict)


def script_keys(script: Script) -> list[Key]:
    """One key per position; equal keys mean equal embeddings."""
    keys: list[Key] = []
    for part in script:
        keys += [(part.key, row) for row in range(len(part.embeds))] if isinstance(part, Rows) else part
    return keys


def script_embeds(script: Script, language_model: LanguageModel, start: int = 0) -> Floats:
    """Embeddings float32 [T-start,D] of the script's positions from `start` on."""
    rows: list[Floats] = []
    for part in script:
        size = len(part.embeds) if isinstance(part, Rows) else len(part)
        if start < size:
            rows.append(part.embeds[start:] if isinstance(part, Rows) else language_model.embed(part[start:]))
        start = max(0, start - size)
    return np.concatenate(rows) if rows else np.zeros((0, language_model.width), np.float32)


class Loop:
    """Decodes with one language model, whose cache keeps the last dialogue: a common beginning is not read again."""

    def __init__(self, language_model: LanguageModel, tokenizer: Tokenizer):
        self._model, self._tokenizer = language_model, tokenizer
        self._keys: list[Key] = []  # what is known to stand in the cache
        self._running = 0

    def release(self) -> None:
        """Free a language model that can be loaded again; what its cache held is read anew."""
        if isinstance(self._model, LazyLanguageModel):
            self._model.release()
            self._keys = []

    def fit(self, positions: int, image_positions: int, max_tokens: int, largest_context: int) -> int:
        """How many tokens may be generated: `max_tokens`, or what the context leaves, with a warning.

        Raises:
            BadInput: the prompt alone does not fit.
        """
        context = self._model.context
        room = context - positions if self._model.keeps else context if positions <= context else 0
        if room < 1:
            larger = f", or load with a context of up to {largest_context}" if largest_context > context else ""
            has = (
                f"context has {context} and the answer needs at least one"
                if self._model.keeps
                else f"encoder takes {context}"
            )
            raise BadInput(
                f"the prompt takes {positions} positions ({image_positions} of them for pictures) but the {has}; "
                f"shorten it or give fewer pictures{larger}"
            )
        if max_tokens > room:
            warnings.warn(
                f"the prompt leaves {room} of the context's {context} positions, so at most {room} tokens are "
                f"generated instead of {max_tokens}",
                RuntimeWarning,
                stacklevel=2,
            )
        return min(max_tokens, room)

    def stream(self, script: Script, decoding: Decoding, watch: Watch) -> Iterator[str | Completion]:
        """Pieces of the answer as they become certain; the last item is the `Completion`.

        Raises:
            MllmEdgeError: another answer was started with this model before this one was finished.
            BadInput: several beams on an engine that has none.
        """
        self._running += 1
        turn = self._running
        if decoding.settings.beams > 1:
            yield from self._searched(script, decoding, watch)
            return
        model, most = self._model, decoding.settings.max_tokens
        stream = TextStream(decoding.stop, decoding.strip, decoding.late_stop)
        sampler = Sampler(decoding.settings, decoding.seed)
        ids: list[int] = []
        ends: list[int] = []  # bytes of text after each token
        states: list[tuple[int, str, Floats]] = []  # place in `ids`, source, [D]
        start = time.perf_counter()
        step = self._prefill(script, bool(watch.before))
        prefilled = time.perf_counter()
        waited = 0.0  # time that the caller spent between two pieces
        while True:
            # 1. Choose a token; what always follows it comes along.
            token = sampler.sample(_ruled(step.logits, ids, decoding.rules))
            group = [token, *decoding.groups.get(token, ())]
            if len(group) > 1 and len(ids) + len(group) > most:
                warnings.warn(
                    f"the answer ends before a group of {len(group)} tokens, such as those of a picture: "
                    f"{most - len(ids)} of {most} tokens are left; give more (max_tokens)",
                    RuntimeWarning,
                    stacklevel=2,
                )
                break  # half a group would mean nothing
            place = len(ids)
            ids += group
            if token in watch.before:
                states.append((place, watch.before[token], step.hidden[-1]))
                watch.found(watch.before[token])
            # 2. Show its text.
            ended = self._tokenizer.is_end(token)
            shown = ""
            for number, one in enumerate([] if ended else group, place):
                data = self._tokenizer.piece(one)
                ends.append((ends[-1] if ends else 0) + len(data))
                shown += stream.feed(data, joined=number > 0 and ids[number - 1] in decoding.added)
            if shown:
                paused = time.perf_counter()
                yield shown
                waited += time.perf_counter() - paused
            if turn != self._running:
                raise MllmEdgeError("this answer was interrupted by a newer one; finish an answer before the next")
            # 3. Read it, unless nothing needs what follows.
            watched = any(one in watch.at for one in group)
            over = ended or stream.stopped or len(ids) >= most
            if over and not watched:
                break
            step = model.extend(group, len(group) if watched else int(bool(watch.before)))
            self._keys += group
            for number, one in enumerate(group if watched else []):
                if one in watch.at:
                    states.append((place + number, watch.at[one], step.hidden[number]))
                    watch.found(watch.at[one])
            if over:
                break
        if shown := stream.finish():
            yield shown
        decoded = 1000 * (time.perf_counter() - prefilled - waited)
        timings = {"prefill": 1000 * (prefilled - start), "decode": decoded}
        completion = self._complete(stream, ids, ends, timings)
        yield replace(completion, states=_by_source(states, len(completion.kept)))  # a stop string may take some away

    def forced(self, script: Script, ids: list[int], decoding: Decoding, watch: Watch) -> Completion:
        """An answer that is given (teacher forcing): read `ids` and keep the hidden states that sources ask for."""
        self._running += 1
        start = time.perf_counter()
        states: list[tuple[int, str, Floats]] = []
        for place, token in enumerate(ids):
            for names, read in ((watch.before, ids[:place]), (watch.at, ids[: place + 1])):
                if token in names:
                    states.append((place, names[token], self._prefill([*script, read], True).hidden[-1]))
                    watch.found(names[token])
        text = TextStream((), decoding.strip)
        for before, token in zip([None, *ids], ids):
            text.feed(self._tokenizer.piece(token), joined=before in decoding.added)
        text.finish()
        timings = {"prefill": 1000 * (time.perf_counter() - start), "decode": 0.0}
        return Completion(text.text, ids, ids, "", "", timings, _by_source(states, len(ids)))

    def _searched(self, script: Script, decoding: Decoding, watch: Watch) -> Iterator[str | Completion]:
        """The best of several beams; its text comes at the end."""
        model = self._model
        if not isinstance(model, Beams):
            raise BadInput(
                f"beams is {decoding.settings.beams}, and this bundle's language model holds one sequence; use beams 1"
            )
        if decoding.groups or watch.before or watch.at:
            raise BadInput(
                f"beams is {decoding.settings.beams}, and a search keeps no hidden states, which this bundle's answers "
                "are made of; use beams 1"
            )
        start = time.perf_counter()
        step = self._prefill(script, False)
        prefilled = time.perf_counter()
        ids = beam_search(model, step.logits, decoding.settings, self._tokenizer.is_end, decoding.rules)
        self._keys = []  # which sequence the cache holds is the engine's business
        stream, ends = TextStream(decoding.stop, decoding.strip, decoding.late_stop), list[int]()
        for token in ids[:-1] if ids and self._tokenizer.is_end(ids[-1]) else ids:
            data = self._tokenizer.piece(token)
            ends.append((ends[-1] if ends else 0) + len(data))
            stream.feed(data)
        stream.finish()
        timings = {"prefill": 1000 * (prefilled - start), "decode": 1000 * (time.perf_counter() - prefilled)}
        yield stream.text
        yield self._complete(stream, ids, ends, timings)

    def _complete(self, stream: TextStream, ids: list[int], ends: list[int], timings: dict[str, float]) -> Completion:
        whole = sum(end <= stream.size for end in ends)
        beyond = b"".join(self._tokenizer.piece(token) for token in ids[whole : len(ends)])
        split = stream.size - (ends[whole - 1] if whole else 0)
        rest, tail = (part.decode("utf-8", "replace") for part in (beyond[:split], beyond[split:]))
        return Completion(stream.text, ids, ids[:whole], rest, tail, timings)

    def _prefill(self, script: Script, state: bool) -> Step:
        """Rewind to what the cache already has of the script and read the rest; the step of its last position."""
        keys = script_keys(script)
        keep = (
            min(_common(self._keys, keys), len(keys) - 1) if self._model.keeps else 0
        )  # the last one again: its logits are needed
        self._keys = keys[:keep]  # should the prefill be interrupted, no more than this is sure to be there
        step = self._model.prefill(script_embeds(script, self._model, keep), keep, state)
        self._keys = keys
        return step


def settings_for(defaults: Generation, **given: float | None) -> Generation:
    """The bundle's defaults with the caller's values in place of those that are not None."""
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _ruled(logits: Floats, ids: Sequence[int], rules: Sequence[Rule]) -> Floats:
    if not rules:
        return logits
    edited = logits.copy()
    for rule in rules:
        rule(ids, edited)
    return edited


def _by_source(states: Sequence[tuple[int, str, Floats]], kept: int) -> dict[str, list[Floats]]:
    found: dict[str, list[Floats]] = {}
    for place, name, state in states:
        if place < kept:
            found.setdefault(name, []).append(state)
    return found


def _common(old: Sequence[Key], new: Sequence[Key]) -> int:
    pairs = enumerate(zip(old, new))
    return next((at for at, (a, b) in pairs if a != b), min(len(old), len(new)))
