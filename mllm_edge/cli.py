"""`main`, the one place where errors are shown. The app is in `commands/app.py`, the commands beside it."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:  # importing takes long enough for Ctrl-C
        from mllm_edge.commands.run import run
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("interrupted; nothing was changed", file=sys.stderr)
        return 130
    return run(list(sys.argv[1:] if arguments is None else arguments))
