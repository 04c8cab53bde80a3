"""Parts of a bundle that are loaded on first use, and released where memory is short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

from mllm_edge.bundle.manifest import StageEntry
from mllm_edge.errors import MllmEdgeError
from mllm_edge.runtime.engines.interface import Array, Beams, Floats, LanguageModel, Stage, Step


class LazyStage:
    """A stage whose engine is created at the first call, and closed after each one unless it is kept."""

    def __init__(self, spec: StageEntry, make: Callable[[], Stage], keep: bool = True):
        self.spec = spec
        self.load_ms = 0.0  # total load time so far
        self._make, self._keep = make, keep
        self._engine: Stage | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        """Whether the engine is in memory."""
        return self._engine is not None

    def load(self) -> None:
        """Create the engine now."""
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
        """Run it; see `interface.Stage`."""
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
    """A language model that can be released between two answers; see `interface.LanguageModel`.

    After `release` no position is left.

    Args:
        make: loads it.
        engine: what `make` gave.
    """

    def __init__(self, make: Callable[[], LanguageModel], engine: LanguageModel):
        self._make = make
        self._engine: LanguageModel | None = engine
        self.context, self.vocabulary = engine.context, engine.vocabulary
        self.width, self.keeps = engine.width, engine.keeps
        self._closed = False

    def release(self) -> None:
        """Unload it; the next use loads it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _ready(self) -> LanguageModel:
        if self._closed:
            raise MllmEdgeError("the language model is closed; load the bundle again")
        if self._engine is None:
            self._engine = self._make()
        return self._engine

    def embed(self, ids: Sequence[int]) -> Floats:
        return self._ready().embed(ids)

    def prefill(self, embeds: Floats, keep: int = 0, state: bool = False) -> Step:
        return self._ready().prefill(embeds, keep, state)

    def extend(self, ids: Sequence[int], states: int = 0) -> Step:
        return self._ready().extend(ids, states)

    def about(self) -> str:
        return self._ready().about()

    def close(self) -> None:
        self._closed = True
        self.release()


class LazyBeams(LazyLanguageModel):
    """One that holds several sequences; see `interface.Beams`."""

    def branch(self, tokens: Sequence[int], parents: Sequence[int]) -> Floats:
        return cast("Beams", self._ready()).branch(tokens, parents)


def lazy_language_model(make: Callable[[], LanguageModel]) -> LazyLanguageModel:
    """Load a language model that can be released, with beams where its engine has them."""
    engine = make()
    return (LazyBeams if isinstance(engine, Beams) else LazyLanguageModel)(make, engine)
