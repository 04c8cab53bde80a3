"""The folder of a training run: ours by a mark, with a whole state in it at every moment from the first save on."""

from __future__ import annotations

import shutil
from pathlib import Path

from mllm_edge.errors import BadInput
from mllm_edge.places import claim, no_link, writing

KIND = "training run"  # what the mark says
RESULTS = ("report.json", "loss.png")  # of a finished run


def begin(out: Path, resume: bool) -> None:
    """Make the folder ours before anything is written there; a new run finds no result of an earlier one.

    Raises:
        BadInput: it is a link or somebody else's; to resume, it holds no run; to begin, it holds one.
    """
    state = last_state(out)
    if resume:
        if state is None:
            raise BadInput(f"{out} has nothing to resume from; run without --resume")
        return
    if state is not None:
        raise BadInput(f"{out} holds a run; go on with it by --resume, or give another out=")
    claim(out, KIND)
    for result in RESULTS:
        (out / result).unlink(missing_ok=True)


def last_state(out: Path) -> Path | None:
    """`state`, or `state.old` where a process was killed between the two renames of `keep_state`."""
    no_link(out)
    final, _, old = _places(out)
    return next((place for place in (final, old) if place.is_dir()), None)


def fresh_state(out: Path) -> None:
    """Make room for the next state, `state.new`."""
    _, fresh, _ = _places(out)
    _remove(fresh)  # half of one, where a process was killed


def keep_state(out: Path) -> None:
    """Put the fresh state in the last one's place, by renames alone."""
    final, fresh, old = _places(out)
    with writing(out):
        if final.exists():
            _remove(old)
            final.rename(old)
        fresh.rename(final)
        _remove(old)


def replace_text(file: Path, text: str) -> None:
    """Write a file that is whole at every moment."""
    fresh = file.with_name(f"{file.name}.new")
    with writing(file):
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)


def _places(out: Path) -> tuple[Path, Path, Path]:
    places = out / "state", out / "state.new", out / "state.old"
    for place in places:
        no_link(place)
    return places


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
