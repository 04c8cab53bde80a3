"""What scenes are drawn on: one color, two, ramps, noise, patterns, paper and photographs."""

import functools
import math

import numpy as np
import numpy.typing as npt
from PIL import Image

from mllm_edge.scenes.model import Background
from mllm_edge.scenes.photographs import photograph

Floats = npt.NDArray[np.float32]

_NOISE_GRIDS = (4, 8, 16, 32, 64)  # octaves of a texture, coarse to fine
_GRAIN = 7.0  # standard deviation of paper's noise, in gray levels of 255


def page(background: Background, width: int, height: int) -> Floats:
    """Draws a background.

    Returns:
        float32 [height, width, 3], mostly in 0..255.

    Raises:
        ValueError: It is a photograph of a package that is not installed.
    """
    first = np.array(background.first, np.float32)
    second = np.array(background.second, np.float32)
    kind = background.kind
    if kind == "plain":
        return np.tile(first, (height, width, 1))
    if kind == "gradient":
        return first + _ramp(background.angle, width, height)[..., None] * (second - first)
    if kind == "texture":
        noise = _noise(background.seed, width, height)
        # The second field varies the brightness without changing the hue, like uneven light.
        return first + noise[..., :1] * (second - first) + 16.0 * (noise[..., 1:] - 0.5)
    if kind == "photo":
        return _photo(background, width, height)
    share = {"two-tone": _halves, "stripes": _stripes, "checks": _checks, "paper": _lines}[kind](
        background, width, height
    )
    drawn: Floats = first + share[..., None] * (second - first)
    if kind == "paper":
        # The grain is that of the picture's pixels, whatever its size.
        drawn += np.random.default_rng(background.seed).normal(0.0, _GRAIN, (height, width, 1)).astype(np.float32)
    return drawn


def _ramp(angle: float, width: int, height: int) -> Floats:
    """Returns float32 [height, width], 0 to 1 across the picture in the direction of the angle."""
    across, down = ((np.arange(side, dtype=np.float32) + 0.5) / side - 0.5 for side in (width, height))
    cos, sin = math.cos(angle), math.sin(angle)
    ramp = (across * cos + down[:, None] * sin) / (abs(cos) + abs(sin)) + 0.5
    return ramp.astype(np.float32)


def _noise(seed: int, width: int, height: int) -> Floats:
    """Returns float32 [height, width, 2]: two fields in 0..1, the sum of octaves of random grids."""
    sized = [np.asarray(field.resize((width, height), Image.Resampling.BICUBIC)) for field in _fields(seed)]
    return np.stack(sized, axis=-1).clip(0.0, 1.0)


@functools.lru_cache(maxsize=4)  # a wide scene's page is drawn several times while objects are placed
def _fields(seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    fields = []
    for _ in range(2):
        field = Image.new("F", (1, 1), 0.5)
        for octave, grid in enumerate(_NOISE_GRIDS):
            ripple = (rng.random((grid, grid), np.float32) - 0.5) * 0.62**octave
            smooth = np.asarray(field.resize((grid, grid), Image.Resampling.BICUBIC))
            field = Image.fromarray(smooth + ripple)
        fields.append(field)
    return fields


def _halves(background: Background, width: int, height: int) -> Floats:
    """A line through the picture: 0 on its one side, 1 on the other."""
    border = 0.3 + 0.4 * np.random.default_rng(background.seed).random()
    return (_ramp(background.angle, width, height) > border).astype(np.float32)


def _stripes(background: Background, width: int, height: int) -> Floats:
    bands = int(np.random.default_rng(background.seed).integers(4, 15))
    return np.floor(_ramp(background.angle, width, height) * bands) % 2


def _checks(background: Background, width: int, height: int) -> Floats:
    fields = int(np.random.default_rng(background.seed).integers(4, 13))  # along the longer side
    side = max(width, height) / fields
    across, down = ((np.arange(length, dtype=np.float32) / side).astype(int) for length in (width, height))
    return ((across + down[:, None]) % 2).astype(np.float32)


def _lines(background: Background, width: int, height: int) -> Floats:
    """Paper: blank, ruled or squared."""
    rng = np.random.default_rng([background.seed, 1])
    form, gap = int(rng.integers(3)), float(rng.uniform(0.05, 0.12)) * max(width, height)
    shift = float(rng.random()) * gap
    share = np.zeros((height, width), np.float32)
    across, down = (((np.arange(length) + shift) % gap < 1.0).astype(np.float32) for length in (width, height))
    if form:
        share = np.maximum(share, down[:, None])
    if form == 2:
        share = np.maximum(share, across)
    return share


def _photo(background: Background, width: int, height: int) -> Floats:
    """A random part of a photograph, mirrored half of the time."""
    picture = photograph(background.photo)
    rng = np.random.default_rng(background.seed)
    scale = min(picture.width / width, picture.height / height) * float(rng.uniform(0.4, 1.0))
    wide, high = width * scale, height * scale
    left, top = float(rng.uniform(0, picture.width - wide)), float(rng.uniform(0, picture.height - high))
    part = picture.resize((width, height), Image.Resampling.BICUBIC, (left, top, left + wide, top + high))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(part, np.float32)
