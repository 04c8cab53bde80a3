"""Pictures from users: any file, bytes, PIL image or array becomes an upright 8-bit RGB picture, or a one-line error.

Modes other than RGB:
- the first frame of an animation;
- transparency (an alpha channel, a palette entry or a color key) is composited on white, as a page would show it;
- 16-bit gray is divided by 257 (65535 becomes 255), not clipped;
- CMYK, palette, grayscale, 1-bit and the rest are converted by Pillow;
- the EXIF orientation is applied.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mllm_edge.errors import BadInput, first_line

MAX_PIXELS = 100_000_000  # checked in the header, before anything is decoded
MAX_SIDE = 65_535  # the longest side that a JPEG can have

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

# Raised by Pillow's decoders on damaged files, SyntaxError for broken PNG and TIFF structure.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, struct.error, OverflowError, MemoryError)


def load_image(source: ImageSource) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    Args:
        source: a path, the bytes of a file, a PIL image, or an array uint8 [H,W,3].

    Raises:
        BadInput: missing, empty, truncated, not a picture, or larger than `MAX_PIXELS` or `MAX_SIDE`.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    if isinstance(source, bytes):
        name, data = "the image", source
    else:
        name, data = str(source), _read(Path(source))
    if not data:
        raise BadInput(f"{name} is empty; give a picture")
    try:
        # Our own limit below replaces Pillow's warning; it is checked on the header, before the pixels are decoded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise BadInput(f"{name} is not a picture that can be read; give a PNG, JPEG, WebP, ...") from None
    except Image.DecompressionBombError:
        raise BadInput(_too_large(name, "its header promises a picture that is")) from None
    except _DAMAGE as error:
        raise BadInput(f"{name} cannot be read ({first_line(error)}); give an undamaged picture") from None
    with opened:
        return _decode(opened, name)


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels; two files of the same picture have the same hash."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise BadInput(f"an image array must be uint8 [H,W,3], not {array.dtype} {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0], "the image array")
    return Image.fromarray(array)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path} cannot be opened ({reason}); give a readable picture file") from None


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(image.width, image.height, name)
    try:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(0)
        image.load()
        # Always a copy: the caller's image may be altered or closed later.
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DAMAGE as error:
        raise BadInput(f"{name} cannot be decoded ({first_line(error)}); give an undamaged picture") from None


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise BadInput(f"{name} has no pixels ({width}x{height}); give a picture")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadInput(_too_large(name, f"{width}x{height} is"))


def _too_large(name: str, subject: str) -> str:
    return f"{name}: {subject} over {MAX_PIXELS // 1_000_000} Mpixel or {MAX_SIDE} px a side; scale it down first"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a channel; Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.nan_to_num(np.asarray(image)).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return image.convert("RGB")
