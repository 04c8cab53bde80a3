from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput
from mllm_edge.runtime import preprocess as module
from mllm_edge.runtime.preprocess import preprocess

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
SPEC = Pixels("pixel_values", 32, "pad", "bicubic", [122, 116, 104], MEAN, STD)
SIZES = [(1, 1), (2000, 3), (3, 2000), (32, 32), (31, 33), (7, 9), (640, 480), (333, 500), (97, 32)]


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 7 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def expand2square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
    """llava/mm_utils.py's rule, written plainly."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_equals_the_transformers_processor(size: tuple[int, int], fit: str) -> None:
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = clip.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD
    )
    image = picture(*size)
    given = expand2square(image, (122, 116, 104)) if fit == "pad" else image
    expected = np.asarray(processor(given, return_tensors="np")["pixel_values"])
    pixels = preprocess(image, replace(SPEC, fit=fit))
    assert pixels.dtype == np.float32 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected)


def test_values_by_hand() -> None:
    pixels = preprocess(
        Image.new("RGB", (5, 5), (255, 0, 51)), replace(SPEC, mean=[0.5, 0.25, 0.2], std=[0.5, 0.5, 2.0])
    )
    assert pixels.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(pixels[0, :, 3, 7], [1.0, -0.5, 0.0], atol=1e-7)


def test_padding_has_its_color_and_the_picture_is_centered() -> None:
    pixels = preprocess(Image.new("RGB", (64, 32), (255, 255, 255)), replace(SPEC, mean=[0.0] * 3, std=[1.0] * 3))
    column = pixels[0, 0, :, 16]
    np.testing.assert_allclose(column[[0, 31]], 122 / 255, atol=1e-6)
    np.testing.assert_allclose(column[[15, 16]], 1.0, atol=1e-6)


@pytest.mark.parametrize("size", [(200, 3000), (3000, 200)])
def test_strips_give_the_whole_picture(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STRIP_PIXELS", 7 * max(size))
    square = expand2square(picture(*size), (122, 116, 104))
    np.testing.assert_array_equal(preprocess(picture(*size), SPEC), preprocess(square, SPEC))


@pytest.mark.parametrize("size", [(500, 3), (3, 500), (64, 48)])
def test_a_very_long_picture_is_resized_where_it_is_needed(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, fit="crop", mean=[0.0] * 3, std=[1 / 255] * 3)
    whole = preprocess(picture(*size), spec)
    monkeypatch.setattr(module, "_WHOLE_PIXELS", 0)
    np.testing.assert_allclose(preprocess(picture(*size), spec), whole, atol=1.01)  # one gray level


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("width", [1, 40, 299])
def test_a_very_tall_picture_is_padded_where_it_is_needed(
    width: int, resample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, resample=resample, mean=[0.0] * 3, std=[1 / 255] * 3)
    whole = preprocess(picture(width, 500), spec)
    monkeypatch.setattr(module, "_WHOLE_PIXELS", 0)
    np.testing.assert_allclose(preprocess(picture(width, 500), spec), whole, atol=1.01)  # one gray level


def test_the_longest_pictures_need_little_memory() -> None:
    for size in [(65_535, 1), (1, 15_000)]:
        for fit in ("pad", "crop"):
            assert preprocess(Image.new("RGB", size, (9, 9, 9)), replace(SPEC, fit=fit)).shape == (1, 3, 32, 32)


def test_unknown_rules_are_refused() -> None:
    for spec in (replace(SPEC, fit="stretch"), replace(SPEC, resample="magic")):
        with pytest.raises(BadInput, match="not known"):
            preprocess(picture(4, 4), spec)
