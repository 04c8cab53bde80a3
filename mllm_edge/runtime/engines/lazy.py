"""Parts of a bundle that are loaded when they are first needed, and let go where memory is short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from mllm_edge.bundle.manifest import StageEntry
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.interface import Array, Floats, LanguageModel, Stage, Step


class LazyStage:
    """A stage whose engine is made at the first call, and closed after each one unless it is kept."""

    def __init__(self, spec: StageEntry, make: Callable[[], Stage], keep: bool = True):
        self.spec = spec
        self.load_ms = 0.0  # all loading so far
        self._make, self._keep = make, keep
        self._engine: Stage | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether the engine is in memory."""
        return self._engine is not None

    def load(self) -> None:
        """Make the engine now."""
        with self._lock:
            self._ready()

    def _ready(self) -> Stage:
        if self._closed:
            raise MllmEdgeError(f"stage {self.spec.name} is closed; load the bundle again")
        if self._engine is None:
            start = time.perf_counter()
            self._engine = self._make()
            self.load_ms += 1000 * (time.perf_counter() - start)
        return self._engine

    def __call__(self, **arrays: Array) -> dict[str, Array]:
        """Run it; see `stage.Stage`."""
        with self._lock:
            try:
                return self._ready()(**arrays)
            finally:
                if not self._keep:
                    self._release()

    def close(self) -> None:
        """Free the engine for good."""
        self._closed = True
        self._release()

    def _release(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class LazyLanguageModel:
    """A language model that can be let go between two answers; see `stage.LanguageModel`.

    What is known of its vocabulary stays known. After `release` no position is left.
    """

    def __init__(self, make: Callable[[], LanguageModel]):
        self._make = make
        self._engine: LanguageModel | None = make()
        self.context, self.vocabulary = self._engine.context, self._engine.vocabulary
        self.width, self.bos = self._engine.width, self._engine.bos
        self._control = dict(self._engine.control_tokens)
        self.want_hidden = False
        self._closed = False

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Control strings and their ids."""
        return self._control

    def release(self) -> None:
        """Free it; the next use loads it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _ready(self) -> LanguageModel:
        if self._closed:
            raise MllmEdgeError("the language model is closed; load the bundle again")
        if self._engine is None:
            self._engine = self._make()
        self._engine.want_hidden = self.want_hidden
        return self._engine

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        return self._ready().tokenize(text, special)

    def piece(self, token: int) -> bytes:
        return self._ready().piece(token)

    def is_end(self, token: int) -> bool:
        return self._ready().is_end(token)

    def embed(self, ids: Sequence[int]) -> Floats:
        return self._ready().embed(ids)

    def prefill(self, embeds: Floats, keep: int = 0) -> Step:
        return self._ready().prefill(embeds, keep)

    def step(self, token: int) -> Step:
        return self._ready().step(token)

    def close(self) -> None:
        self._closed = True
        self.release()
