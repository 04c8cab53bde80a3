"""`bench`: what it runs, what it reports, and in which forms."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundle_for_tests import write_bundle
from PIL import Image

import mllm_edge
from mllm_edge import bench, cli
from mllm_edge.errors import BadInput, MissingPackage
from mllm_edge.runtime import Answer, Tokens
from mllm_edge.runtime.stage import Step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bench") / "tiny.bundle")


class FakeDecoder:
    """Counts steps; always prefers token 3."""

    context, bos = 100, 1

    def __init__(self) -> None:
        self.steps: list[int] = []

    def step(self, token: int) -> Step:
        self.steps.append(token)
        return Step(np.array([0, 0, 0, 1], np.float32), None)


class FakeModel:
    """Answers a question in 1000, 10, 20, 30, 40, 50 ms, one after the other; half of each is prefill."""

    load_ms = 7.0

    def __init__(self, manifest: Any) -> None:
        self.manifest, self.language_model = manifest, FakeDecoder()
        self.pictures: list[bytes] = []

    def generate(self, prompt: str, image: Any = None, *, raw: bool = False, max_tokens: int = 0) -> Answer:
        if image is not None:
            self.pictures.append(image.tobytes())
        total = [1000.0, 10, 20, 30, 40, 50][max(0, len(self.pictures) - 1)]
        timings = {"load": 7.0, "preprocess": 1.0, "vision_encoder": 2.0}
        timings |= {"prefill": total / 2, "decode": 0.1, "total": total}
        return Answer("x", Tokens(11, 4, 1, [2]), timings, {})


@pytest.fixture
def fake(folder: Path) -> FakeModel:
    from mllm_edge import bundle

    return FakeModel(bundle.read(folder))


def measured(model: Any, **options: Any) -> bench.Result:
    return bench.measure(model, "a.bundle", threads=3, **{"repeat": 5, "gen_tokens": 4, **options})


def test_the_first_repetition_does_not_count(fake: FakeModel) -> None:
    result = measured(fake)
    assert result.first_token_ms == bench.Spread(min=10, median=30, p90=46)  # 46: between the two slowest of five
    assert result.stages_ms["prefill"] == bench.Spread(5, 15, 23)
    assert list(result.stages_ms) == ["preprocess", "vision_encoder", "prefill"]
    # 10 of the prompt's 11 positions are read, BOS is kept: 10 in 5, 10, 15, 20, 25 ms
    assert result.prefill_tokens_per_s == bench.Spread(400, 666.667, 1600)
    assert (result.repetitions, result.load_ms, result.environment.threads) == (5, 7.0, 3)


def test_every_repetition_has_a_new_picture_and_decodes_all_tokens(fake: FakeModel) -> None:
    measured(fake)
    assert len(set(fake.pictures)) == 6
    assert fake.language_model.steps == [2, 3, 3, 3] * 6


def test_progress_is_told(fake: FakeModel) -> None:
    told: list[tuple[int, int, bool]] = []
    measured(fake, repeat=1, report=lambda _, number, total, seconds: told.append((number, total, seconds is None)))
    assert told == [(1, 2, True), (1, 2, False), (2, 2, True), (2, 2, False)]


def test_the_encoder_and_the_whole_prefill_run_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mllm_edge.load(folder, threads=1) as model:
        encoder, prefill = model.stages["vision_encoder"], model.language_model.prefill
        encoded, read = [], []

        def encode(**arrays: Any) -> Any:
            encoded.append(1)
            return encoder(**arrays)

        def prefilled(embeds: Any, keep: int = 0) -> Step:
            read.append((len(embeds), keep))
            return prefill(embeds, keep)

        monkeypatch.setitem(model.stages, "vision_encoder", encode)
        monkeypatch.setattr(model.language_model, "prefill", prefilled)
        result = measured(model, repeat=2)
    assert len(encoded) == 3
    assert read[1::2] == [(result.prompt_tokens - 1, 1)] * 3
    assert result.image_tokens == 4


@pytest.mark.parametrize("options", [{"repeat": 0}, {"gen_tokens": 0}, {"gen_tokens": 90}])
def test_numbers_that_do_not_work_are_refused(options: dict[str, int], fake: FakeModel) -> None:
    with pytest.raises(BadInput):
        measured(fake, **options)


def test_a_picture_may_be_given(fake: FakeModel, tmp_path: Path) -> None:
    Image.new("RGB", (3, 2), (9, 9, 9)).save(tmp_path / "gray.png")
    measured(fake, image=tmp_path / "gray.png", repeat=1)
    assert all(picture[3:] == b"\x09" * 15 for picture in fake.pictures)  # all but the first pixel
    with pytest.raises(BadInput):
        measured(fake, image=tmp_path / "nowhere.png")


def test_forms_say_the_same(fake: FakeModel) -> None:
    one = measured(fake)
    other = dataclasses.replace(one, bundle="b|b", stages_ms={"mask_decoder": bench.Spread(1, 2, 3)})
    results = [one, other]
    assert json.loads(bench.render(results, "json")) == bench.document(results)
    lines = bench.render(results, "jsonl").splitlines()
    assert [json.loads(line)["bundle"] for line in lines] == ["a.bundle", "b|b"]
    rows = list(csv.DictReader(io.StringIO(bench.render(results, "csv"))))
    assert rows[0]["stages_ms.prefill.median"] == "15.0"
    assert rows[1]["stages_ms.prefill.median"] == ""
    assert rows[1]["stages_ms.mask_decoder.p90"] == "3"
    table = [line for line in bench.render(results, "md").splitlines() if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert "a.bundle" in table[0]
    assert "b\\|b" in table[0]  # a bar in a name does not end its cell
    assert next(line for line in table if line.startswith("| prefill, ms")).split("|")[2].strip() == "15.0 (5.0, 23.0)"
    with pytest.raises(BadInput):
        bench.render(results, "xml")


def test_plot_is_a_png(fake: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = measured(fake)
    path = tmp_path / "stages.png"
    bench.plotter(path)([one, dataclasses.replace(one, stages_ms={"mask_decoder": bench.Spread(1, 2, 3)})])
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 500
    for wrong in (tmp_path / "stages.txt", tmp_path / "no" / "stages.png"):
        with pytest.raises(BadInput):
            bench.plotter(wrong)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage):
        bench.plotter(path)


def test_several_bundles_are_measured_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(folder), str(folder), "-r", "1", "--gen-tokens", "2", "--threads", "1", "--quiet", "--json"]
    assert cli.main(words) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["bundle"] for result in results] == [str(folder)] * 2
    assert all(result["generated_tokens"] == 2 and result["environment"]["threads"] == 1 for result in results)


def test_errors_of_the_other_process_arrive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(folder), "nowhere.bundle", "-r", "1", "--threads", "1", "--quiet"]) == 2
    assert capsys.readouterr().err.endswith(
        "is not a bundle (it has no bundle.json); make one with: mllm-edge export\n"
    )


def test_a_process_that_dies_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = SimpleNamespace(stdout="", returncode=-11)
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(mllm_edge.errors.MllmEdgeError, match="ended with code -11"):
        bench.measure_apart(folder, {})


def test_command_measures_one_bundle(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "stages.png"
    words = ["bench", str(folder), "-r", "1", "--gen-tokens", "2", "--threads", "1", "--plot", str(plot)]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "| vision_encoder, ms" in said.out
    assert "[2/2]" in said.err
    assert plot.is_file()
