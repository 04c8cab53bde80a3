import io
import os
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mllm_edge.errors import BadInput
from mllm_edge.runtime.images import load_image, pixel_hash

RED = (200, 30, 10)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(source: object, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = load_image(source)  # type: ignore[arg-type]
    assert image.mode == "RGB"
    return image.getpixel(at)  # type: ignore[return-value]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_every_kind_of_source(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), RED)
    image.save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), encode(image), image, np.asarray(image)]
    hashes = {pixel_hash(load_image(source)) for source in sources}
    assert len(hashes) == 1 and load_image(image) is not image


def test_hash_tells_shapes_apart() -> None:
    assert pixel_hash(Image.new("RGB", (3, 2))) != pixel_hash(Image.new("RGB", (2, 3)))


def test_damaged_files_are_one_line_errors_that_name_them(tmp_path: Path) -> None:
    whole = encode(Image.effect_noise((64, 64), 50).convert("RGB"))
    files = {
        "empty.png": b"",
        "text.png": b"this is no picture",
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": encode(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:400],
        "head.gif": b"GIF89a",
        "bomb.png": png_header(30_000, 30_000),
        "long.png": png_header(70_000, 10),
        "none.png": png_header(0, 10),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for path in [*(tmp_path / name for name in files), tmp_path / "missing.png", tmp_path]:
        with pytest.raises(BadInput) as caught:
            load_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bomb_is_refused_without_decoding(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    for side in (10_001, 30_000):  # the second is also over Pillow's own limit
        with pytest.raises(BadInput, match="Mpixel"):
            load_image(png_header(side, side))
    assert not recwarn.list


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    assert load_image(encode(Image.new("RGB", size, RED))).size == size


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, (0, 0, 255))]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixel(data) == RED
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert pixel(opened) == RED


def test_palette_gray_one_bit_and_cmyk() -> None:
    assert pixel(encode(Image.new("RGB", (4, 4), RED).convert("P", palette=Image.Palette.ADAPTIVE))) == RED
    assert pixel(encode(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)


def test_transparency_shows_white() -> None:
    assert pixel(encode(Image.new("RGBA", (4, 4), (*RED, 0)))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (4, 4), (*RED, 255)))) == RED
    assert pixel(encode(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    halves = pixel(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert halves == (127, 127, 127)
    palette = Image.new("RGB", (4, 4), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    assert pixel(encode(palette, transparency=palette.getpixel((0, 0)))) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    image = load_image(encode(Image.fromarray(values)))
    assert [image.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_exif_orientation() -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right
    upright = load_image(encode(image, "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == RED and upright.getpixel((10, 35)) == (0, 0, 255)


@pytest.mark.parametrize(
    "entry",
    [
        (0x11A, 10, 1, struct.pack("<I", 38), struct.pack("<ii", -1, 0)),  # XResolution -1/0
        (0x100, 11, 1, struct.pack("<f", float("nan")), b""),  # ImageWidth as NaN
        (0x111, 4, 1 << 30, struct.pack("<I", 1 << 30), b""),  # points out of the file
        (0x110, 99, 1, b"abcd", b""),  # no such type
    ],
)
def test_an_odd_entry_does_not_cost_the_rotation(entry: tuple[int, int, int, bytes, bytes]) -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 255))
    image.paste(RED, (0, 0, 20, 20))
    rotation = (0x112, 3, 1, struct.pack("<HH", 6, 0))
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + tag[3] for tag in sorted([entry[:4], rotation]))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0) + entry[4]
    jpeg = encode(image, "JPEG")
    photograph = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]
    upright = load_image(photograph)
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 35)) == pytest.approx((0, 0, 255), abs=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(orientation: int) -> None:
    image = Image.effect_noise((7, 5), 90).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert pixel_hash(load_image(data)) == pixel_hash(expected)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), (0, 128, 255)),
        (np.array([[-10.0, 0.0, 30.0]], np.float32), (0, 64, 255)),
        (np.array([[np.nan, np.inf, 2.0, 4.0]], np.float32), (0, 255, 0, 255)),
        (np.array([[0, 1 << 30, 1 << 31 - 1]], np.int32), (0, 255, 255)),
        (np.array([[7.0, 7.0]], np.float32), (128, 128)),
    ],
)
def test_float_and_32_bit_are_scaled_by_their_range_with_a_warning(values: np.ndarray, shown: tuple[int, ...]) -> None:
    with pytest.warns(UserWarning, match="is shown as black"):
        image = load_image(encode(Image.fromarray(values), "TIFF"))
    assert [image.getpixel((x, 0)) for x in range(len(shown))] == [(value,) * 3 for value in shown]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "F"])
def test_strips_make_the_whole_picture(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gray = Image.effect_noise((9, 11), 90)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    else:
        image = gray.convert(mode if mode != "P" else "RGB")
        image = image.convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image
        if mode in ("RGBA", "LA"):
            image.putalpha(Image.effect_noise((9, 11), 120))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = load_image(image)
        monkeypatch.setattr("mllm_edge.runtime.images._STRIP_PIXELS", 20)
        assert pixel_hash(load_image(image)) == pixel_hash(whole)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.webp").open("wb") as stream:
        stream.write(b"RIFF\0\0\0\0WEBP")
        stream.truncate(40 << 30)
    for path, reason in [
        (tmp_path / "pipe.png", "no plain file"),
        (Path("/dev/zero"), "no plain file"),
        (tmp_path / "sparse.webp", "over 1 GB"),
    ]:
        with pytest.raises(BadInput, match=reason):
            load_image(path)


def test_heic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadInput, match="pip install pillow-heif"):
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


def test_heic_is_read_where_its_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    package = types.SimpleNamespace(register_heif_opener=lambda: told.append("registered"))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    with pytest.raises(BadInput, match="not a picture that can be read"):
        load_image(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert told == ["registered"]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray) -> None:
    with pytest.raises(BadInput, match=r"uint8 \[H,W,3\]"):
        load_image(array)
