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

from mllm_edge.errors import MllmEdgeError
from mllm_edge.progress import Pace, PlainSteps, PlainTraining, Report, TrainReport, metrics_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, ProgressColumn
    from rich.table import Table

    from mllm_edge.bundle import Manifest, Parity, TensorSpec
    from mllm_edge.export.tensorrt.build import Built
    from mllm_edge.models.info import SystemInfo
    from mllm_edge.runtime import Answer

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
        """Progress over numbered steps that are told when they begin and when they have ended."""
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
        if Path(filename).is_relative_to(Path(__file__).parent):
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


def size(count: float) -> str:
    """Bytes for people: 10^3, 10^6, 10^9."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `right` hold numbers."""
    from rich.box import SIMPLE
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def pairs(title: str, rows: dict[str, str]) -> Table:
    """Names and what they stand for."""
    made = table(title, "", "")
    made.show_header = False
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def system_table(systems: Sequence[SystemInfo]) -> Table:
    """The registry."""
    made = table("", "system", "answers", "stages", "configs", "base checkpoints", "licenses")
    for info in systems:
        made.add_row(
            f"{info.name}\n{info.title}",
            ", ".join(info.tasks),
            "\n".join(info.stages),
            "\n".join(f"{name}: {what}" for name, what in info.configs.items()),
            "\n".join(info.base_checkpoints),
            "\n".join(f"{name}: {licence}" for name, licence in info.licences.items()),
        )
    return made


def bundle_tables(folder: Path, manifest: Manifest) -> list[Table]:
    """All that `bundle.json` says."""
    prompt = manifest.prompt
    about = {
        "system": f"{manifest.system}, config {manifest.config}",
        "target": manifest.target,
        "tasks": ", ".join(manifest.tasks),
        "made": f"{manifest.created} by mllm-edge {manifest.tool_version}",
        "weights": ", ".join(f"{key} {_short(value)}" for key, value in manifest.source.items()),
        "licenses": "; ".join(f"{key}: {value}" for key, value in manifest.licences.items()),
        "size": size(sum(entry.bytes for entry in manifest.files())),
        "context": f"{manifest.language_model.context_length} positions",
        "prompt": f"{prompt.name}: {prompt.first.replace('{system}', prompt.system)!r}",
        "stops at": ", ".join(map(repr, prompt.stop)),
    }
    for step in manifest.preprocessing:
        about[f"pictures for {step.stage}"] = f"{step.size} x {step.size}, {step.fit}, {step.resample}"
    files = table(
        "stages", "stage", "engine", "precision", "takes", "gives", "size", "sha256", "parity", right=("size",)
    )
    checked = {row.name: "passed" if row.passed else "FAILED" for row in manifest.parity}
    for stage in manifest.stages:
        weight = stage.bytes + sum(entry.bytes for entry in stage.data_files)
        files.add_row(
            stage.name,
            stage.engine,
            stage.precision,
            _specs(stage.inputs),
            _specs(stage.outputs),
            size(weight),
            stage.sha256[:12],
            checked.get(stage.name, "not verified"),
        )
    lm = manifest.language_model
    files.add_row(
        lm.name,
        lm.engine,
        lm.precision,
        f"embeddings [T,{lm.hidden_width}]",
        f"logits [{lm.vocabulary}]",
        size(lm.bytes),
        lm.sha256[:12],
        checked.get(lm.name, "not verified"),
    )
    for entry in manifest.extra_files:
        files.add_row(entry.file, "", "", "", "", size(entry.bytes), entry.sha256[:12], "")
    shown = [pairs(str(folder), about), files, *([_engines(manifest)] if manifest.target == "trt" else [])]
    return [*shown, parity_table(manifest.parity)] if manifest.parity else shown


def engine_table(built: Sequence[Built]) -> Table:
    """What `mllm-edge build` did."""
    numbers = ("size", "built in", "cosine to its graph")
    made = table("engines", "stage", "engine", *numbers, right=numbers)
    for one in built:
        took = f"{one.seconds:.1f} s" if one.seconds else "was there"
        cosine = "not compared here" if one.cosine is None else f"{one.cosine:.6f}"
        made.add_row(one.stage, one.file, size(one.bytes), took, cosine)
    return made


def parity_table(rows: Sequence[Parity]) -> Table:
    """Measured against PyTorch, with what is allowed; rows of TensorRT engines are against their graphs."""
    engines = any(" on sm_" in row.name for row in rows)
    title = "parity with PyTorch" + ("; on a GPU, of an engine with its graph" if engines else "")
    made = table(title, "stage", "result", "measured", "tolerance")
    for row in rows:
        made.add_row(
            row.name,
            "passed" if row.passed else "FAILED",
            ", ".join(f"{key} {value:.4g}" for key, value in row.measured.items()),
            ", ".join(f"{key} {value:g}" for key, value in row.tolerance.items()) or "none",
        )
    return made


def timing_table(answer: Answer) -> Table:
    """What an answer cost; parts that took no time are left out."""
    timings = {name: ms for name, ms in answer.timings.items() if ms > 0}
    made = table("", *timings, "peak memory", right=(*timings, "peak memory"))
    peak = answer.memory["peak_rss"]
    made.add_row(*(f"{ms:.1f} ms" for ms in timings.values()), "" if peak is None else f"{peak:.0f} MB")
    return made


def _engines(manifest: Manifest) -> Table:
    """TensorRT's engines: what they are for, or that the device has yet to build its own."""
    made = table("TensorRT engines", "stage", "GPUs", "built by", "size", right=("size",))
    for stage in manifest.stages:
        for engine in stage.engines:
            gpus, by = ", ".join(engine.capabilities), f"{engine.package} {engine.version}"
            made.add_row(stage.name, gpus, by, size(engine.bytes))
        if not stage.engines:
            made.add_row(stage.name, "to build", "on the device: mllm-edge build", "")
    if manifest.build.devices:
        made.add_row("all", ", ".join(manifest.build.devices), "the board itself: mllm-edge build", "")
    return made


def _specs(specs: Sequence[TensorSpec]) -> str:
    return "\n".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs)


def _short(value: str) -> str:
    is_hash = len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:12] if is_hash else value
