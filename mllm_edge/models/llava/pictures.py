"""How pictures become pixels, by a checkpoint's own preprocessor_config.json (transformers' CLIP image processor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_edge.checkpoints.tensors import read_json
from mllm_edge.errors import BadInput
from mllm_edge.models.fields import check_fixed, flag
from mllm_edge.models.llava.model import IMAGE_MEAN, IMAGE_STD

FILES = ("preprocessor_config.json", "processor_config.json")
_RESAMPLE = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
_FIXED: dict[str, tuple[Any, ...]] = {
    "do_resize": (None, True),
    "do_rescale": (None, True),
    "rescale_factor": (None, 1 / 255),
    "do_convert_rgb": (None, True),
}


@dataclass(frozen=True)
class Preprocessing:
    """What `Pixels` says of a picture, beside its size."""

    fit: str
    resample: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_preprocessing(folder: Path, side: int, fit: str = "") -> Preprocessing:
    """The preprocessing of a folder; CLIP's own where it has no file for it.

    Args:
        folder: a checkpoint, or its vision tower.
        side: of the picture that the vision encoder takes.
        fit: how pictures are made square, where that is said elsewhere.

    Raises:
        BadInput: a setting (named, with its value and the file) that gives pixels which a bundle cannot describe.
    """
    config: dict[str, Any] = {}
    where = folder / FILES[0]
    for file in FILES:
        if (folder / file).is_file():
            found = read_json(folder / file)
            config |= {**found, **(found.get("image_processor") or {})}
            where = folder / file
    check_fixed(config, _FIXED, where)
    number = config.get("resample", 3)
    if number not in _RESAMPLE:
        raise BadInput(
            f"{where} has resample {number!r}, which is not supported (1, 2 or 3 is); use another checkpoint"
        )
    mean, std = _colours(config, "image_mean", IMAGE_MEAN, where), _colours(config, "image_std", IMAGE_STD, where)
    if not flag(config, "do_normalize", where, True):
        mean, std = (0.0,) * 3, (1.0,) * 3
    return Preprocessing(_fit(config, side, fit, where), _RESAMPLE[number], mean, std)


def _fit(config: Mapping[str, Any], side: int, fit: str, where: Path) -> str:
    """How a picture is made square. One that is square already is only resized, whatever is cut afterwards."""
    padded = fit or ("pad" if flag(config, "do_pad", where) else "")
    if flag(config, "do_center_crop", where, True):
        _same_side(config, "crop_size", side, where)
        _same_side(config, "size", side, where)
        return padded if padded == "pad" else _shape_of_size(config)
    shape = _shape_of_size(config)
    if shape == "crop" and padded != "pad":
        raise BadInput(
            f"{where} has do_center_crop false and resizes the shortest edge: its pictures are not square, which is "
            "not supported; use another checkpoint"
        )
    _same_side(config, "size", side, where)
    return padded or shape


def _shape_of_size(config: Mapping[str, Any]) -> str:
    """A size of two sides resizes to them whatever the picture's shape; one of the shortest edge keeps the shape."""
    size = config.get("size")
    return "squash" if isinstance(size, dict) and "height" in size else "crop"


def _same_side(config: Mapping[str, Any], key: str, side: int, where: Path) -> None:
    value = config.get(key, side)
    sides = (
        [value] if not isinstance(value, dict) else [value.get(name) for name in ("height", "width", "shortest_edge")]
    )
    if "longest_edge" in (value if isinstance(value, dict) else {}) or {one for one in sides if one is not None} != {
        side
    }:
        raise BadInput(
            f"{where} has {key} {value!r}, which is not supported: the vision encoder takes {side} x {side}; "
            "use another checkpoint"
        )


def _colours(config: Mapping[str, Any], key: str, default: tuple[float, ...], where: Path) -> tuple[float, ...]:
    values = config.get(key, default)
    right = isinstance(values, (list, tuple)) and len(values) == 3
    if not right or not all(isinstance(value, (int, float)) and abs(value) < 1e6 for value in values):
        raise BadInput(f"{where} has {key} {values!r}, which are not three numbers; copy it again")
    if key == "image_std" and 0 in values:
        raise BadInput(f"{where} has {key} {values!r}, which divides by zero; copy it again")
    return tuple(map(float, values))
