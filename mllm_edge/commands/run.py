"""One run of the command line: its streams, its exit code, and any error as one line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import typer

from mllm_edge.commands import streams
from mllm_edge.commands.app import UsageError, app, usage_line
from mllm_edge.commands.frame import Common
from mllm_edge.commands.screen import Interrupted, Screen
from mllm_edge.errors import BadInput, MllmEdgeError
from mllm_edge.places import FULL


def run(words: Sequence[str]) -> int:
    """Run these words; returns the exit code. The only place where any error is caught."""
    stdout_open = streams.open_streams()
    options = words[: words.index("--")] if "--" in words else words
    screen = Screen(**{field.name: f"--{field.name}" in options for field in dataclasses.fields(Common)})
    try:
        if not stdout_open:
            raise BadInput("stdout is closed, so no result can be shown; send it to a file or to /dev/null")
        code = typer.main.get_command(app).main(list(words), "mllm-edge", standalone_mode=False, obj=screen)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return screen.error(BadInput(usage_line(error)))
    except KeyboardInterrupt:  # before or after the command itself
        return screen.error(Interrupted("interrupted"))
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        streams.drop_stdout()
        return 1
    except Exception as error:  # noqa: BLE001  the boundary: whatever it is becomes one line
        try:
            sys.stdout.flush()
        except OSError as full:  # stdout is a file on a full disk
            streams.drop_stdout()
            return screen.error(MllmEdgeError(f"stdout cannot be written ({full.strerror}); send it elsewhere"))
        return screen.error(_of_the_system(error) or error)


def _of_the_system(error: Exception) -> MllmEdgeError | None:
    """What the system says against a file that was named to us or found beside it, or of a full disk; else None."""
    if not isinstance(error, OSError) or not error.strerror:
        return None
    if error.errno in FULL:
        told: MllmEdgeError = MllmEdgeError(
            f"what is written does not fit ({error.strerror}); make room or write elsewhere"
        )
    elif error.filename is not None:
        told = BadInput(f"{error.filename} cannot be used ({error.strerror}); check the path and its permissions")
    else:
        return None
    return told.with_traceback(error.__traceback__)
