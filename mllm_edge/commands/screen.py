"""What the command line writes: results on stdout, everything about them on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mllm_edge.commands.shown import timing_table
from mllm_edge.commands.streams import Prints, document_text, escaped, read_line
from mllm_edge.errors import MllmEdgeError
from mllm_edge.progress import Pace, PlainSteps, PlainTraining, Report, TrainReport, metrics_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
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
        finished: the part of the document that is done; an error's document holds it too.
    """

    def __init__(self, json: bool = False, quiet: bool = False, debug: bool = False):
        self.as_json, self.quiet, self.debug = json, quiet, debug
        self.kept = "nothing was changed"
        self.finished: dict[str, Any] = {}
        self._out, self._err = sys.stdout, sys.stderr
        self._answered = False
        self._mid_line = False
        self._live: Progress | None = None

    def result(self, document: Any, *shown: RenderableType, paint: Callable[[str], str] | None = None) -> None:
        """The command's result: `document` with `--json`, else `shown`, whose texts a terminal gets in colors."""
        with _writing_stdout():
            if self.as_json:
                self._out.write(document_text(document, self._out) + "\n")
            else:
                for part in shown:
                    if isinstance(part, str):
                        text = escaped(part)
                        self._out.write((paint(text) if paint and self._in_color else text) + "\n")
                    else:
                        _console(self._out).print(_Escaped(part))
            self._out.flush()
        self._answered = True

    def partly(self, document: dict[str, Any], *shown: RenderableType) -> None:
        """What was finished before an error that follows; as JSON it goes with the error."""
        if self.as_json:
            self.finished = document
        else:
            self.result(document, *shown)

    @property
    def _in_color(self) -> bool:
        return self._out.isatty() and not os.environ.get("NO_COLOR")

    def text(self, piece: str) -> None:
        """A piece of an answer, on stdout as it comes."""
        with _writing_stdout():
            self._out.write(escaped(piece))
            self._out.flush()
        self._mid_line = not piece.endswith("\n") if piece else self._mid_line

    def end_text(self) -> None:
        """End the line of an answer that was shown as it came, if it has not ended."""
        if self._mid_line:
            self.text("\n")

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
            self._err.write(escaped("".join(traceback.format_exception(error))))
        line = " ".join(str(error).split())
        if not isinstance(error, MllmEdgeError):
            line = f"{type(error).__name__}: {line}; run it again with --debug for the traceback"
        print(escaped(line if isinstance(error, Interrupted) else f"error: {line}"), file=self._err)
        if self.as_json and not self._answered:
            with contextlib.suppress(OSError, MllmEdgeError):  # stdout itself may be what failed
                self.result({**self.finished, "error": line, "exit_code": code})
        return code

    def question(self, prompt: str) -> str | None:
        """The next line of stdin, asked for with `prompt` on a terminal; None at its end."""
        if not sys.stdin.isatty():
            return read_line() or None
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
            print(f"\n{escaped(line)}", file=self._err)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While a command works: libraries' prints, logs and warnings go to stderr, and Ctrl-C becomes a message."""
        handler = _Lines(self)
        logger = logging.getLogger("mllm_edge")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if self.quiet else logging.INFO)
        try:
            with contextlib.redirect_stdout(Prints(self._err)), warnings.catch_warnings():
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
                text = escaped(step) + (f" {part:.0%}{paces[step].left(part)}" if part else "")
                bar.update(task, description=text, total=total, completed=number - (seconds is None) + part)

            yield report

    @contextlib.contextmanager
    def late_steps(self) -> Iterator[Report]:
        """As `steps`, from the first report on: until then the answer's text may be coming."""
        with contextlib.ExitStack() as shown:
            begun: list[Report] = []

            def report(step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None:
                if not begun:
                    self.end_text()
                    begun.append(shown.enter_context(self.steps()))
                begun[0](step, number, total, seconds, part)

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
        shown = escaped(part) if isinstance(part, str) else _Escaped(part)
        (self._live.console if self._live else self._console_err).print(shown, soft_wrap=isinstance(part, str))

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


@contextlib.contextmanager
def _writing_stdout() -> Iterator[None]:
    """What the system says against stdout as one line; a reader that has gone is no error, see `run`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise MllmEdgeError(f"stdout cannot be written ({error.strerror}); send it elsewhere") from error


class _Escaped:
    """A table whose texts, which may come from anybody's files, do nothing to the terminal."""

    def __init__(self, part: RenderableType):
        self._part = part

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._part, options):
            yield segment if segment.control else segment._replace(text=escaped(segment.text))


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
