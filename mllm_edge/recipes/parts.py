"""Parts of a model on disk between recipes: `<part>.safetensors` in the folder of the run that trained it.

Instead of a folder a recipe may give `packages`: the part is then read from an ordinary package (see `llava_packaged`).
`shipped` stands for the vision encoder that comes with mllm-edge, which recipes of all tiny systems may start from,
`shipped/gill` for the parts of that system that come with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllm_edge.errors import BadInput
from mllm_edge.models.resolve import shipped

PACKAGES, SHIPPED = "packages", "shipped"


def part_folder(folder: str) -> Path:
    """The folder that an `init` names: a path, or `shipped`, or `shipped/SYSTEM`.

    Raises:
        BadInput: no parts of that system ship.
    """
    if folder == SHIPPED:
        return shipped("encoder") / "tiny"
    first, _, system = folder.partition("/")
    if first != SHIPPED:
        return Path(folder)
    place = shipped(system) / "parts"
    if "/" in system or not place.is_dir():
        raise BadInput(f"no parts of {system!r} come with the package; give a run's folder")
    return place


def save_part(folder: Path, part: str, dims: dict[str, Any], state: dict[str, Tensor], prefix: str, dtype: str) -> None:
    """Write the tensors below `prefix` (stripped from their names) as `dtype`, with the part's dims in the metadata."""
    from safetensors.torch import save_file

    kept = {
        name.removeprefix(prefix): tensor.to(getattr(torch, dtype)).contiguous().cpu()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    save_file(kept, folder / f"{part}.safetensors", {"dims": json.dumps(dims)})


def tokenizer_folder(folder: str) -> Path:
    """Folder of the tokenizer of the decoder in `folder`. Raises MllmEdgeError when a package is not installed."""
    if folder != PACKAGES:
        return Path(folder)
    from mllm_edge.models.llava.packaged import tokenizer

    return tokenizer()


def read_part(folder: str, part: str) -> dict[str, Tensor]:
    """Read a part written by `save_part`, or a package's part, in fp32.

    Raises:
        BadInput: the run has not been trained, or its file is damaged.
        MllmEdgeError: a package is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if folder == PACKAGES:
        from mllm_edge.models.llava.packaged import base_tensors

        tensors, prefix = base_tensors(), f"{part}."
        return {name.removeprefix(prefix): tensors[name].float() for name in tensors if name.startswith(prefix)}
    path = _part_file(folder, part)
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged ({error}); train that part again") from None


def part_dims(folder: str, part: str) -> dict[str, Any]:
    """The dims that `save_part` was given.

    Raises:
        BadInput: the run has not been trained, or its file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = _part_file(folder, part)
    try:
        with safe_open(path, "pt") as file:
            dims = json.loads((file.metadata() or {})["dims"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadInput(f"{path} is damaged ({error}); train that part again") from None
    return dict(dims)


def _part_file(folder: str, part: str) -> Path:
    path = part_folder(folder) / f"{part}.safetensors"
    if not path.is_file():
        raise BadInput(f"{path} is missing; train that part first (see: mllm-edge recipes)")
    return path
