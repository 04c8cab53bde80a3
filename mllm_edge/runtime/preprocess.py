"""From a picture to a stage's pixel tensor. Training and runtime both call `preprocess`, with bit-identical results.

The arithmetic is that of transformers' CLIP image processor (Pillow backend), with `expand2square` of Liu et al. 2023
(their mm_utils.py) for fit "pad". Very long pictures give the same result without huge intermediate pictures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput

RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}
_STRIP_PIXELS = 1 << 22  # a padded picture is resized in strips of about this many pixels
_WHOLE_PIXELS = 100_000_000  # a padded or resized picture with more pixels is computed only where it is needed
_REACH = {"bilinear": 1, "bicubic": 2, "lanczos": 3}  # result pixels that a filter looks at on each side


def preprocess(image: Image.Image, spec: Pixels) -> NDArray[np.float32]:
    """Fit, resize, scale to 0..1 and normalize one picture.

    Args:
        image: RGB, upright (see `images.load_image`).
        spec: the manifest's source.

    Returns:
        float32 [1,3,S,S] with S = `spec.size`.

    Raises:
        BadInput: the bundle asks for an unknown fit or filter.
    """
    if spec.resample not in RESAMPLE or spec.fit not in _FITS:
        raise BadInput(f"preprocessing {spec.fit}/{spec.resample} is not known; install a newer mllm-edge")
    if image.mode != "RGB":
        image = image.convert("RGB")
    fitted = _FITS[spec.fit](image, spec)
    # float64 for scaling, then float32, as in transformers' rescale and normalize
    scaled = (np.asarray(fitted).astype(np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(spec.mean, np.float32), np.array(spec.std, np.float32)
    normalized = ((scaled - mean) / std).transpose(2, 0, 1)[None]
    missing = [(0, spec.size - side) for side in normalized.shape[2:]]  # only nonzero for "longest"
    return np.ascontiguousarray(np.pad(normalized, [(0, 0), (0, 0), *missing]))


def longest_side(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height of a picture whose longest side becomes `size` (segment_anything/utils/transforms.py)."""
    scale = size / max(width, height)
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def _pad(image: Image.Image, spec: Pixels) -> Image.Image:
    """Centre on a square of `pad_color` and resize it, strip by strip.

    Pillow resizes rows first and columns second; rows are independent, so the square, which would be huge for a long
    picture, is never created. Of the square of a very tall picture, only the columns that hold some of it are computed,
    which may differ by one gray level.
    """
    side, size, color = max(image.size), spec.size, (spec.pad_color[0], spec.pad_color[1], spec.pad_color[2])
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), color)
    first, last, start, end = 0, size, 0, side  # columns of the result, and what they are made of
    if side * image.height > _WHOLE_PIXELS:
        scale, reach = side / size, _REACH[spec.resample] + 1
        first, last = max(0, int(left / scale) - reach), min(size, int((left + image.width) / scale) + reach + 1)
        start, end = max(0, int((first - reach) * scale)), min(side, int((last + reach) * scale) + 1)
    box = (first * side / size - start, last * side / size - start)
    rows = max(1, _STRIP_PIXELS // (end - start))
    for row in range(0, image.height, rows):
        height = min(rows, image.height - row)
        strip = Image.new("RGB", (end - start, height), color)
        strip.paste(image.crop((0, row, image.width, row + height)), (left - start, 0))
        part = strip.resize((last - first, height), RESAMPLE[spec.resample], box=(box[0], 0, box[1], height))
        narrow.paste(part, (first, top + row))
    return narrow.resize((size, size), RESAMPLE[spec.resample])


def _crop(image: Image.Image, spec: Pixels) -> Image.Image:
    """Resize the shortest edge to `size` and cut the centre out."""
    size, short, filter_ = spec.size, min(image.size), RESAMPLE[spec.resample]
    width, height = (size if side == short else int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if width * height <= _WHOLE_PIXELS:
        resized = image.resize((width, height), filter_)
        return resized.crop((left, top, left + size, top + size))
    # Pillow's two passes one by one, rows then columns; the long side only inside the crop.
    across, down = image.width / width, image.height / height
    rows = image.resize((size, image.height), filter_, box=(left * across, 0, (left + size) * across, image.height))
    return rows.resize((size, size), filter_, box=(0, top * down, size, (top + size) * down))


def _longest(image: Image.Image, spec: Pixels) -> Image.Image:
    """Resize the longest side to `size`; the rest of the square stays empty until after the normalization."""
    return image.resize(longest_side(*image.size, spec.size), RESAMPLE[spec.resample])


def _squash(image: Image.Image, spec: Pixels) -> Image.Image:
    """Resize to the square, whatever the picture's shape."""
    return image.resize((spec.size, spec.size), RESAMPLE[spec.resample])


_FITS: dict[str, Callable[[Image.Image, Pixels], Image.Image]] = {
    "pad": _pad,
    "crop": _crop,
    "longest": _longest,
    "squash": _squash,
}
