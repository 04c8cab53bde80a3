"""preprocessor_config.json: pixels equal to those of transformers' processor, or a refusal that names the setting."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mllm_edge.bundle.sources import Pixels
from mllm_edge.errors import BadInput
from mllm_edge.models.llava.pictures import read_preprocessing
from mllm_edge.runtime.preprocess import preprocess

USUAL: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "do_rescale": True,
    "do_center_crop": True,
    "do_normalize": True,
    "resample": 3,
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}
CHANGES: list[dict[str, Any]] = [
    {},
    {"size": 28, "crop_size": 28},
    {"resample": 2},
    {"resample": 1},
    {"do_normalize": False},
    {"size": {"height": 28, "width": 28}, "do_center_crop": False},
    {"size": {"height": 28, "width": 28}},
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (28, 28)])
def test_pixels_are_those_of_transformers(tmp_path: Path, change: dict[str, Any], shape: tuple[int, int]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**USUAL, **change}))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8))
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = np.asarray(processor(picture, return_tensors="np")["pixel_values"])
    found = read_preprocessing(tmp_path, 28)
    source = Pixels("p", 28, found.fit, found.resample, [0, 0, 0], list(found.mean), list(found.std))
    np.testing.assert_allclose(preprocess(picture, source), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "has size {'shortest_edge': 32}"),
        ({"size": {"height": 28, "width": 56}}, "has size {'height': 28, 'width': 56}"),
        ({"size": {"longest_edge": 28}}, "has size {'longest_edge': 28}"),
        ({"crop_size": {"height": 14, "width": 14}}, "has crop_size"),
        ({"do_center_crop": False}, "has do_center_crop false"),
        ({"do_center_crop": "no"}, "has do_center_crop 'no'"),
        ({"do_rescale": False}, "has do_rescale False"),
        ({"do_resize": False}, "has do_resize False"),
        ({"rescale_factor": 1.0}, "has rescale_factor 1.0"),
        ({"resample": 0}, "has resample 0"),
        ({"image_mean": [0.5]}, r"has image_mean \[0\.5\]"),
        ({"image_std": [1, 0, 1]}, "divides by zero"),
    ],
)
def test_what_a_bundle_cannot_say_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**USUAL, **change}))
    with pytest.raises(BadInput, match=rf"preprocessor_config\.json .*{message}"):
        read_preprocessing(tmp_path, 28)


def test_without_a_file_it_is_clips_own(tmp_path: Path) -> None:
    found = read_preprocessing(tmp_path, 336)
    assert (found.fit, found.resample, found.mean[0]) == ("crop", "bicubic", 0.48145466)
    assert read_preprocessing(tmp_path, 336, "pad").fit == "pad"
