"""What a model answers."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tokens:
    """Positions of the prompt (pictures included), those that pictures took, and generated tokens with their ids.

    `ids` includes the token that ended the answer, if one did.
    """

    prompt: int
    image: int
    generated: int
    ids: list[int]


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    `timings` are milliseconds: `load` is the bundle's loading, `total` runs from the call to the last token and so
    does not contain it. A stage that did not run, because the picture was known, took 0. `memory` is in MB (10^6).
    """

    text: str
    tokens: Tokens
    timings: dict[str, float]
    memory: dict[str, float | None]
    masks: list[dict[str, Any]] = field(default_factory=list)
    boxes: list[dict[str, Any]] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The document that `mllm-edge run --json` prints."""
        return {
            "text": self.text,
            "tokens": vars(self.tokens),
            "masks": self.masks,
            "boxes": self.boxes,
            "images": self.images,
            "timings_ms": {name: round(value, 3) for name, value in self.timings.items()},
            "memory_mb": self.memory,
        }


def peak_rss() -> float | None:
    """Highest resident memory of this process so far in MB; None where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
