"""Progress of long work: to a caller by a callback, to a log by lines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

PLAIN_SECONDS = 10.0  # between lines about the same work


class Report(Protocol):
    """Called for numbered steps: at a step's start (`seconds` None), during a long one, and at its end.

    `number` counts from 1 to `total`; `part` is the share of the step that is done, 0 at its start.
    """

    def __call__(self, step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None: ...


TrainReport = Callable[[int, int, dict[str, float]], None]  # optimizer step, steps in all, metrics


class Pace:
    """Estimates the remaining time from the pace since the first call; work done before that (a resumed run) is not
    counted."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._first: float | None = None

    def left(self, part: float) -> str:
        """ ", 12 s left"; empty if unknown yet. `part` is the share that is done."""
        self._first = part if self._first is None else self._first
        done = part - self._first
        return f", {(time.monotonic() - self._started) / done * (1 - part):.0f} s left" if done > 0 else ""


class PlainSteps:
    """Prints a line when a step starts, every `PLAIN_SECONDS` while it runs, and when it ends."""

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self._paces = defaultdict[str, Pace](Pace)
        self._last = 0.0

    def __call__(self, step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None:
        took = "..." if seconds is None else f"{seconds:.1f} s"
        if part:
            took = f"{part:.0%}{self._paces[step].left(part)}"
            if time.monotonic() - self._last < PLAIN_SECONDS:
                return
        self._last = time.monotonic()
        self._note(f"[{number}/{total}] {step} {took}")


class PlainTraining:
    """Prints a line every `PLAIN_SECONDS`."""

    def __init__(self, note: Callable[[str], None]):
        self._note = note
        self._pace = Pace()
        self._last: float | None = None

    def __call__(self, step: int, steps: int, metrics: dict[str, float]) -> None:
        left = self._pace.left(step / steps)
        now = time.monotonic()
        if self._last is None or step == steps or now - self._last >= PLAIN_SECONDS:
            self._last = now
            self._note(f"step {step}/{steps}: {metrics_line(metrics)}{left}")


def metrics_line(metrics: dict[str, float]) -> str:
    """Names and values with four digits."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
