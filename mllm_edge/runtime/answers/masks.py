"""The pipeline for masks: each [SEG] of an answer becomes a mask of the picture, tied to the phrase before it.

The mask encoder is the heaviest stage and runs on a thread of its own from the first [SEG] on, while the language model
still writes. Plain answers never load it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from mllm_edge.bundle.manifest import Manifest, Prompt
from mllm_edge.errors import BadInput
from mllm_edge.runtime.answer import Mask
from mllm_edge.runtime.answers.resize import at_full_size, box_of, confidence
from mllm_edge.runtime.decoding.loop import Completion, Watch
from mllm_edge.runtime.decoding.text_stream import TextStream
from mllm_edge.runtime.engines.interface import Array, Floats, LanguageModel
from mllm_edge.runtime.engines.lazy import LazyLanguageModel, LazyStage
from mllm_edge.runtime.tensors import ImageEncoder, Picture

SEG = "[SEG]"
STATES, LOGITS = "seg_states", "mask_logits"


@dataclass(frozen=True)
class Phrase:
    """Where in an answer's text the words stand that a mask is tied to; an empty span where there are none."""

    start: int
    end: int


class Grounding:
    """Masks of one bundle's answers."""

    def __init__(self, manifest: Manifest, stages: Mapping[str, LazyStage], encoder: ImageEncoder, lm: LanguageModel):
        if SEG not in lm.control_tokens:
            raise BadInput(f"the bundle's language model has no token {SEG}; export the bundle again")
        if manifest.language_model.state_positions.get(SEG) != "before":
            raise BadInput(f"the bundle reads the state of {SEG} in an unknown way; install a newer mllm-edge")
        self._stages, self._encoder, self._lm, self._prompt = stages, encoder, lm, manifest.prompt
        self._decoder = next(s for s in manifest.stages if LOGITS in [spec.name for spec in s.outputs])
        self._embedding = next(spec.name for spec in self._decoder.inputs if spec.name != STATES)
        maker = next(s for s in manifest.stages if self._embedding in [spec.name for spec in s.outputs])
        self._frame = next(step.size for step in manifest.preprocessing if step.stage == maker.name)
        self._thread = ThreadPoolExecutor(1, "mask-encoder")

    @property
    def alongside(self) -> bool:
        """Whether mask encoder and language model may be in memory together."""
        return not isinstance(self._lm, LazyLanguageModel)

    def phrases(self, completion: Completion) -> list[Phrase]:
        """The phrase of each [SEG] of an answer."""
        return phrases(completion.kept, self._lm, self._prompt, completion.strip)

    def begin(self, picture: Picture | None, timings: dict[str, float]) -> MaskWork:
        """What to do for one answer about a picture."""
        return MaskWork(self, picture, timings)

    def embedding(self, picture: Picture, timings: dict[str, float]) -> Future[Array]:
        """The picture's embedding for masks, being made."""
        return self._thread.submit(self._encoder.tensor, picture, self._embedding, timings)

    def masks(
        self,
        picture: Picture,
        embedding: Array,
        completion: Completion,
        spans: Sequence[Phrase],
        timings: dict[str, float],
    ) -> list[Mask]:
        """One mask per state of the completion, all decoded in one call."""
        stage = self._stages[self._decoder.name]
        stage.load()
        start = time.perf_counter()
        states: Floats = np.stack(completion.states)
        logits = np.asarray(stage(**{self._embedding: embedding, STATES: states})[LOGITS])
        decoded = time.perf_counter()
        timings[self._decoder.name] = 1000 * (decoded - start)
        found = [self._mask(one, span, completion.text, picture) for one, span in zip(logits, spans, strict=True)]
        timings["masks"] = 1000 * (time.perf_counter() - decoded)
        return found

    def _mask(self, logits: Floats, span: Phrase, text: str, picture: Picture) -> Mask:
        full = at_full_size(logits, self._frame, picture.image.size)
        mask = full > 0
        words = text[span.start : span.end]
        return Mask(words, (span.start, span.end), confidence(full), box_of(mask), mask)

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown()


class MaskWork:
    """The masks of one answer, while it is written."""

    def __init__(self, grounding: Grounding, picture: Picture | None, timings: dict[str, float]):
        self._grounding, self._picture, self._timings = grounding, picture, timings
        self._embedding: Future[Array] | None = None

    @property
    def watch(self) -> Watch:
        """For the text pipeline."""
        return Watch(self._grounding._lm.control_tokens[SEG], self._found)

    def _found(self) -> None:
        if self._grounding.alongside:
            self._begin()

    def _begin(self) -> None:
        if self._embedding is None and self._picture is not None:
            self._embedding = self._grounding.embedding(self._picture, self._timings)

    def finish(self, completion: Completion, let_go: Callable[[], None]) -> list[Mask]:
        """The masks of the finished answer. `let_go` frees the language model where memory is short."""
        if not completion.states:
            return []
        spans = self._grounding.phrases(completion)
        if not self._grounding.alongside:
            let_go()
        self._begin()
        if self._picture is None or self._embedding is None:
            warnings.warn(
                f"the answer has {len(completion.states)} {SEG} but there is no picture to cut masks from",
                RuntimeWarning,
                stacklevel=2,
            )
            return []
        embedding = self._embedding.result()
        return self._grounding.masks(self._picture, embedding, completion, spans, self._timings)


def phrases(ids: Sequence[int], lm: LanguageModel, prompt: Prompt, strip: bool = True) -> list[Phrase]:
    """The phrase of each [SEG] of an answer's ids, in order.

    A mask belongs to the last phrase that closed before it and has none yet. An open phrase ends where its [SEG]
    stands; a phrase that opens again begins there; a closing tag alone means nothing. A [SEG] without a phrase has an
    empty one. `strip` is the completion's.
    """
    tokens = {token: text for text, token in lm.control_tokens.items()}
    opening, closing = prompt.phrase or ("", "")
    stream = TextStream((), strip)
    found: list[Phrase] = []
    begun: int | None = None
    last: Phrase | None = None
    for before, token in zip([None, *ids], ids):
        name = tokens.get(token, "")
        end = len(stream.text.rstrip())
        if name and name == opening:
            begun = len(stream.text)
        elif name and name == closing and begun is not None:
            last, begun = _trimmed(stream.text, begun, end), None
        elif name == SEG:
            if begun is not None:
                last, begun = _trimmed(stream.text, begun, end), None
            found.append(last or Phrase(end, end))
            last = None
        stream.feed(lm.piece(token), joined=tokens.get(before or -1, "") in prompt.added)
    return found


def _trimmed(text: str, start: int, end: int) -> Phrase | None:
    """The span without white space around it; None where nothing is left."""
    start += len(text[start:]) - len(text[start:].lstrip())
    return Phrase(start, end) if start < end else None
