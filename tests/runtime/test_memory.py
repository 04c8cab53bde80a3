"""What may be in memory at the same time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import mllm_edge
from mllm_edge.bundle.manifest import Manifest, TensorSpec
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput
from mllm_edge.runtime import loading
from mllm_edge.runtime import memory as budget
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.lazy import LazyLanguageModel

OPTIONS = Options("cpu", False, 1, "f16", 128)
GIGA = 10**9


@pytest.fixture
def manifest(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Stages of 1 GB and 2 GB, which work with half a GB, and a language model of 4 GB; the process takes nothing."""
    monkeypatch.setattr(budget, "resident_memory", lambda: 0)
    for name in ("PICTURES", "SCRATCH", "SCRATCH_PER_WIDTH"):
        monkeypatch.setattr(budget, name, 0)
    monkeypatch.setattr(budget, "MARGIN", 1.0)
    known = read_manifest(tiny_bundle)
    one, two = (
        replace(stage, bytes=size * GIGA, activation_bytes=GIGA // 2) for stage, size in zip(known.stages, (1, 2))
    )
    assert known.language_model.gguf is not None
    details = replace(known.language_model.gguf, bytes=4 * GIGA)
    lm = replace(known.language_model, gguf=details, kv_bytes_per_token=0)
    return replace(known, stages=[one, two], language_model=lm)


@pytest.mark.parametrize(
    ("size", "stages", "language_model", "peak"),
    [
        (None, True, True, 7.5),  # all weights, and the activations of the one at work
        (7.5, True, True, 7.5),
        (7.4, False, True, 6.5),  # the language model and the larger stage
    ],
)
def test_the_fastest_way_that_fits(
    manifest: Manifest, size: float | None, stages: bool, language_model: bool, peak: float
) -> None:
    way = budget.plan_memory(manifest, OPTIONS, None if size is None else int(size * GIGA))
    assert (way.keep_stages, way.keep_language_model, way.peak / GIGA) == (stages, language_model, peak)


def test_what_cannot_fit_is_refused_at_once_with_its_size(manifest: Manifest) -> None:
    with pytest.raises(
        BadInput, match=r"cannot stay under 5\.6G: it takes 6\.1G at least \(language_model 3\.7G and c"
    ):
        budget.plan_memory(manifest, OPTIONS, 6 * GIGA)


def test_masks_may_be_made_when_the_language_model_has_gone(manifest: Manifest) -> None:
    encoder = replace(
        manifest.stages[1],
        name="mask_encoder",
        bytes=5 * GIGA,
        inputs=[TensorSpec("mask_pixel_values", "float32", [1])],
        outputs=[TensorSpec("image_embedding", "float32", [1])],
    )
    three = replace(manifest, stages=[*manifest.stages, encoder])
    # Alone 5.5; the language model beside the larger of the others 4 + 2.5.
    way = budget.plan_memory(three, OPTIONS, 7 * GIGA)
    assert (way.keep_stages, way.keep_language_model, way.peak / GIGA) == (False, False, 6.5)


@pytest.mark.parametrize(("text", "size"), [("6G", 6 << 30), ("1.5g", 3 << 29), ("512M", 512 << 20), ("100", 100)])
def test_sizes(text: str, size: int) -> None:
    assert budget.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "6T", "-1G", "0", "nanG", "1e300G", "six"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="no amount of memory"):
        budget.parse_size(text)


def test_a_tight_bundle_answers_as_a_loose_one(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    with mllm_edge.load(tiny_bundle, threads=1) as model:
        expected = model.generate("the", picture, max_tokens=4)
    monkeypatch.setattr(loading, "plan_memory", lambda *_: budget.MemoryPlan(False, False, 0))
    with mllm_edge.load(tiny_bundle, threads=1, memory_budget=1 << 30) as model:
        assert isinstance(model.language_model, LazyLanguageModel)
        assert model.generate("the", picture, max_tokens=4).text == expected.text
        assert not any(stage.loaded for stage in model.stages.values())
        model._pipeline._loop.release()
        assert model.language_model._engine is None
        assert model.generate("the", picture, max_tokens=4).text == expected.text
