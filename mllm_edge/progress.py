"""Telling how far long work has come: to a caller by a function, to a log by lines."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Protocol

PLAIN_SECONDS = 10.0  # between lines about the same work


class Report(Protocol):
    """Told of numbered steps: when one begins (`seconds` None), how far a long one has come, and when one has ended.

    `number` counts from 1 to `total`; `part` is the share that is done of the step, 0 as it begins.
    """

    def __call__(self, step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None: ...


TrainReport = Callable[[int, int, dict[str, float]], None]  # optimizer step, of how many, metrics


class Pace:
    """How long the rest takes, by the pace since the first call: what was done before it took no time of this run."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._first: float | None = None

    def left(self, part: float) -> str:
        """ ", 12 s left"; empty where it cannot be said yet. `part` is the share that is done."""
        self._first = part if self._first is None else self._first
        done = part - self._first
        return f", {(time.monotonic() - self._begun) / done * (1 - part):.0f} s left" if done > 0 else ""


class PlainSteps:
    """A line when a step begins, now and then while it goes on, and when it has ended."""

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
    """A line now and then."""

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
