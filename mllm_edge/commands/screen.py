"""What the command line writes: results on stdout, everything about them on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mllm_edge.commands.shown import timing_table
from mllm_edge.errors import MllmEdgeError
from mllm_edge.progress import Pace, PlainSteps, PlainTraining, Report, TrainReport, metrics_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, ProgressColumn

    from mllm_edge.runtime import Answer

PACKAGE = Path(__file__).parents[1]
PLAIN_WIDTH = 160  # columns of tables that do not go to a terminal


class Interrupted(MllmEdgeError):
    """Ctrl-C. The message says what is kept."""

    exit_code = 130


class Screen:
    """One command's two streams.

    With `--json` stdout gets one document and nothing else. `--quiet` leaves warnings and errors on stderr.

    Attributes:
        kept: what remains when the command is interrupted.
    """

    def __init__(self, json: bool = False, quiet: bool = False, debug: bool = False):
        self.as_json, self.quiet, self.debug = json, quiet, debug
        self.kept = "nothing was changed"
        self._out, self._err = sys.stdout, sys.stderr
        self._answered = False
        self._live: Progress | None = None

    def result(self, document: Any, *shown: RenderableType) -> None:
        """The command's result: `document` with `--json`, else `shown`."""
        if self.as_json:
            self._out.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        else:
            for part in shown:
                if isinstance(part, str):
                    self._out.write(part + "\n")
                else:
                    _console(self._out).print(part)
        self._out.flush()
        self._answered = True

    @property
    def in_color(self) -> bool:
        """Whether people read stdout on a terminal that shows colors."""
        return self._out.isatty() and not os.environ.get("NO_COLOR")

    def text(self, piece: str) -> None:
        """A piece of an answer, on stdout as it comes."""
        self._out.write(piece)
        self._out.flush()

    def times(self, answer: Answer) -> None:
        """What an answer cost, beside it."""
        self.aside(timing_table(answer))

    def aside(self, part: RenderableType) -> None:
        """Something for people beside the result."""
        if not self.quiet:
            self._note(part)

    def error(self, error: Exception) -> int:
        """Say in one line what went wrong; returns the exit code."""
        code = error.exit_code if isinstance(error, MllmEdgeError) else 1
        if self.debug:
            traceback.print_exception(type(error), error, error.__traceback__, file=self._err)
        line = " ".join(str(error).split())
        if not isinstance(error, MllmEdgeError):
            line = f"{type(error).__name__}: {line}; run it again with --debug for the traceback"
        print(line if isinstance(error, Interrupted) else f"error: {line}", file=self._err)
        if self.as_json and not self._answered:
            with contextlib.suppress(OSError):  # stdout itself may be what failed
                self.result({"error": line, "exit_code": code})
        return code

    def question(self, prompt: str) -> str | None:
        """The next line of stdin, asked for with `prompt` on a terminal; None at its end."""
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        # input() edits lines only where stdout is the terminal
        with contextlib.redirect_stdout(self._err if self.as_json else self._out):
            try:
                return input(prompt)
            except EOFError:
                return None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """One turn of a dialogue: on a terminal, an error or Ctrl-C ends the turn and not the dialogue."""
        try:
            yield
        except (KeyboardInterrupt, MllmEdgeError) as error:
            if not sys.stdin.isatty():
                raise
            line = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
            print(f"\n{line}", file=self._err)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a command works: libraries' prints, logs and warnings go to stderr, and Ctrl-C becomes a message."""
        handler = _Lines(self)
        logger = logging.getLogger("mllm_edge")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if self.quiet else logging.INFO)
        try:
            with contextlib.redirect_stdout(self._err), warnings.catch_warnings():
                warnings.showwarning = self._warning
                yield
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted; {self.kept}") from None
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    @contextlib.contextmanager
    def steps(self) -> Iterator[Report]:
        """Progress over numbered steps that report when they begin and when they have ended."""
        if self.quiet:
            yield lambda *_: None
            return
        if not self._err.isatty():
            yield PlainSteps(self._note)
            return
        from rich.progress import MofNCompleteColumn

        with self._bar([MofNCompleteColumn()]) as bar:
            task, paces = bar.add_task("preparing", total=None), defaultdict[str, Pace](Pace)

            def report(step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None:
                text = step + (f" {part:.0%}{paces[step].left(part)}" if part else "")
                bar.update(task, description=text, total=total, completed=number - (seconds is None))

            yield report

    @contextlib.contextmanager
    def training(self) -> Iterator[TrainReport]:
        """Progress of a training run, with the time that is left."""
        if self.quiet:
            yield lambda *_: None
            return
        if not self._err.isatty():
            yield PlainTraining(self._note)
            return
        from rich.progress import MofNCompleteColumn, TimeRemainingColumn

        with self._bar([MofNCompleteColumn(), TimeRemainingColumn()]) as bar:
            task = bar.add_task("preparing", total=None)
            yield lambda step, steps, metrics: bar.update(
                task, description=metrics_line(metrics), total=steps, completed=step
            )

    @contextlib.contextmanager
    def _bar(self, columns: Sequence[ProgressColumn]) -> Iterator[Progress]:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        text = TextColumn("{task.description}", markup=False)
        progress = Progress(
            text, BarColumn(), *columns, TimeElapsedColumn(), console=self._console_err, redirect_stdout=False
        )
        with progress:
            self._live = progress
            try:
                yield progress
            finally:
                self._live = None

    @cached_property
    def _console_err(self) -> Console:
        return _console(self._err)

    def _note(self, part: RenderableType) -> None:
        (self._live.console if self._live else self._console_err).print(part, soft_wrap=isinstance(part, str))

    def _warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Ours are for users; those of libraries are for developers."""
        if Path(filename).is_relative_to(PACKAGE):
            self._note(f"warning: {message}")
        elif self.debug:
            self._note(warnings.formatwarning(message, category, filename, lineno, line).rstrip())


class _Lines(logging.Handler):
    """Log records as lines on stderr, above a progress bar."""

    def __init__(self, screen: Screen):
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen._note(record.getMessage())


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)
