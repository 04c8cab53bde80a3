"""Pictures from users: any file, bytes, PIL image or array becomes an upright 8-bit RGB picture, or a one-line error.

Modes other than RGB:
- the first frame of an animation;
- transparency (an alpha channel, a palette entry or a color key) is composited on white, as a page would show it;
- 16-bit gray is divided by 257 (65535 becomes 255), not clipped;
- 32-bit and float gray is scaled so that its own range becomes 0 to 255, with a warning;
- CMYK, palette, grayscale, 1-bit and the rest are converted by Pillow;
- the EXIF orientation is applied.

Beside the decoded picture and the result, which take 4 bytes a pixel each, only strips are in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from mllm_edge.errors import BadInput, first_line

MAX_PIXELS = 100_000_000  # checked in the header, before anything is decoded
MAX_SIDE = 65_535  # the longest side that a JPEG can have
MAX_BYTES = 1 << 30  # of a file; some of Pillow's decoders read it whole
_STRIP_PIXELS = 1 << 20  # pixels that are converted at once

# The brands of HEIC in a file's first box (ISO/IEC 23008-12).
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")

# What makes a picture upright that was stored with this EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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
        return _upright(*_decode(source, "the image"))
    if isinstance(source, bytes):
        return _read(io.BytesIO(source), len(source), "the image")
    path = Path(source)
    with _open(path) as stream:
        return _read(stream, os.fstat(stream.fileno()).st_size, str(path))


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an RGB picture's size and pixels; two files of the same picture have the same hash."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    for strip in _strips(image):
        digest.update(strip.tobytes())
    return digest.hexdigest()


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        raise BadInput(f"an image array must be uint8 [H,W,3], not {array.dtype} {list(array.shape)}")
    _check_size(array.shape[1], array.shape[0], "the image array")
    return Image.fromarray(array)


def _open(path: Path) -> BinaryIO:
    """Open a plain file; a pipe or a device, whose reading may never end, is refused."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadInput(f"{path} is no plain file; give a picture file")
        return path.open("rb")
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadInput(f"{path} cannot be opened ({reason}); give a readable picture file") from None


def _read(stream: BinaryIO, size: int, name: str) -> Image.Image:
    if size == 0:
        raise BadInput(f"{name} is empty; give a picture")
    if size > MAX_BYTES:
        raise BadInput(f"{name} has {size} bytes, over {MAX_BYTES >> 30} GB; scale the picture down first")
    _know_heic(stream, name)
    try:
        # Our own limit replaces Pillow's warning; it is checked on the header, before the pixels are decoded.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(stream)
    except UnidentifiedImageError:
        raise BadInput(f"{name} is not a picture that can be read; give a PNG, JPEG, WebP, ...") from None
    except Image.DecompressionBombError:
        raise BadInput(_too_large(name, "its header promises a picture that is")) from None
    except _DAMAGE as error:
        raise BadInput(f"{name} cannot be read ({first_line(error)}); give an undamaged picture") from None
    with opened:
        picture, orientation = _decode(opened, name)
    return _upright(picture, orientation)  # what was opened is freed by now


def _know_heic(stream: BinaryIO, name: str) -> None:
    """Let Pillow read HEIC where the file is one."""
    head = stream.read(12)
    stream.seek(0)
    if head[4:8] != b"ftyp" or head[8:12] not in _HEIC:
        return
    try:
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise BadInput(f"{name} is HEIC; run: pip install pillow-heif, or save the picture as JPEG or PNG") from None
    register_heif_opener()


def _decode(image: Image.Image, name: str) -> tuple[Image.Image, int]:
    """The first frame as RGB, always a copy of what a caller may alter or close later; and its EXIF orientation."""
    _check_size(image.width, image.height, name)
    try:
        if image.tell() > 0:
            image.seek(0)
        image.load()
        return _to_rgb(image, name), _orientation(image)
    except _DAMAGE as error:
        raise BadInput(f"{name} cannot be decoded ({first_line(error)}); give an undamaged picture") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, which is upright, where there is none. Nothing else of the EXIF data is looked at."""
    raw = image.info.get("exif")
    try:
        if isinstance(raw, bytes):  # Pillow 12 stops at an entry that it cannot read, and this one comes late
            return _entry(raw.removeprefix(b"Exif\0\0"), ExifTags.Base.Orientation)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about entries that we do not read
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(value[0] if isinstance(value, tuple) else value)
    except (*_DAMAGE, TypeError, AttributeError, ZeroDivisionError):
        return 1


def _entry(tiff: bytes, tag: int) -> int:
    """A short of a TIFF's first directory (TIFF 6.0, section 2); 1 where it is not there."""
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        name, kind, _, value = struct.unpack_from(order + "HHIH", tiff, place)
        if (name, kind) == (tag, 3):
            return int(value)
    return 1


def _upright(picture: Image.Image, orientation: int) -> Image.Image:
    return picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise BadInput(f"{name} has no pixels ({width}x{height}); give a picture")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadInput(_too_large(name, f"{width}x{height} is"))


def _too_large(name: str, subject: str) -> str:
    return f"{name}: {subject} over {MAX_PIXELS // 1_000_000} Mpixel or {MAX_SIDE} px a side; scale it down first"


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    convert = _converter(image, name)
    made, top = Image.new("RGB", image.size), 0
    for strip in _strips(image):
        made.paste(convert(strip), (0, top))
        top += strip.height
    return made


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """The picture in strips of whole rows, from the top."""
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _converter(image: Image.Image, name: str) -> Callable[[Image.Image], Image.Image]:
    """What makes a strip of this picture RGB."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_sixteen_bits  # Pillow's own conversion would clip at 255
    if image.mode in ("I", "F"):
        return _by_range(image, name)
    return _on_white if image.has_transparency_data else lambda strip: strip.convert("RGB")


def _from_sixteen_bits(strip: Image.Image) -> Image.Image:
    values = np.asarray(strip).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


def _by_range(image: Image.Image, name: str) -> Callable[[Image.Image], Image.Image]:
    """What scales the values of a 32-bit or float picture: they have no black and no white of their own."""
    ranges = [
        (float(finite.min()), float(finite.max()))
        for values in map(np.asarray, _strips(image))
        if (finite := values[np.isfinite(values)]).size
    ]
    low, high = min((low for low, _ in ranges), default=0.0), max((high for _, high in ranges), default=0.0)
    kind = "float" if image.mode == "F" else "32-bit"
    warnings.warn(f"{name} has {kind} pixels; {low:g} is shown as black, {high:g} as white", stacklevel=2)
    if low == high:
        return lambda strip: Image.new("RGB", strip.size, (128, 128, 128))  # one value is neither

    def convert(strip: Image.Image) -> Image.Image:
        values = np.nan_to_num(np.asarray(strip).astype(np.float64), nan=low, posinf=high, neginf=low)
        return Image.fromarray(np.rint((values - low) / (high - low) * 255).astype(np.uint8)).convert("RGB")

    return convert


def _on_white(strip: Image.Image) -> Image.Image:
    picture = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
