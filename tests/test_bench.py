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
from mllm_edge.bench import forms, power, runs
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError
from mllm_edge.runtime import Answer, Tokens
from mllm_edge.runtime.engines.interface import Step


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bench") / "tiny.bundle")


class FakeDecoder:
    """Keeps the tokens that it was extended by; always prefers token 3."""

    context = 100

    def __init__(self) -> None:
        self.steps: list[int] = []

    def extend(self, ids: list[int], states: int = 0) -> Step:
        self.steps += ids
        return Step(np.array([0, 0, 0, 1], np.float32), np.zeros((0, 1), np.float32))

    def about(self) -> str:
        return "a fake"


class FakeModel:
    """Answers a question in 1000, 10, 20, 30, 40, 50 ms, one after the other; half of each is prefill."""

    load_ms = 7.0
    target, tokenizer = "cpu", SimpleNamespace(bos=1)

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
    return FakeModel(read_manifest(folder))


def measured(model: Any, **options: Any) -> bench.Result:
    return bench.measure(model, "a.bundle", threads=3, **{"repeat": 5, "gen_tokens": 4, **options})


def test_the_first_repetition_does_not_count(fake: FakeModel) -> None:
    result = measured(fake)
    assert result.first_token_ms == bench.Spread(
        min=10, median=30, p90=46, p99=49.6
    )  # 46: between the two slowest of five
    assert result.stages_ms["prefill"] == bench.Spread(5, 15, 23, 24.8)
    assert list(result.stages_ms) == ["preprocess", "vision_encoder", "prefill"]
    # 10 of the prompt's 11 positions are read, BOS is kept: 10 in 5, 10, 15, 20, 25 ms
    assert result.prefill_tokens_per_s == bench.Spread(400, 666.667, 1600, 1960)
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
        stage, prefill = model.stages["vision_encoder"], model.language_model.prefill
        encoder: Any = stage._engine
        encoded, read = [], []

        def encode(**arrays: Any) -> Any:
            encoded.append(1)
            return encoder(**arrays)

        def prefilled(embeds: Any, keep: int = 0, state: bool = False) -> Step:
            read.append((len(embeds), keep))
            return prefill(embeds, keep, state)

        encode.close = encoder.close  # type: ignore[attr-defined]
        monkeypatch.setattr(stage, "_engine", encode)
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
    other = dataclasses.replace(one, bundle="b|b", stages_ms={"mask_decoder": bench.Spread(1, 2, 3, 4)})
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
    assert next(line for line in table if line.startswith("| prefill, ms")).split("|")[2].strip() == (
        "15.0 (5.0, 23.0, 24.8); 50 % of the time"
    )
    with pytest.raises(BadInput):
        bench.render(results, "xml")


def test_plot_is_a_png(fake: FakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = measured(fake)
    path = tmp_path / "stages.png"
    bench.plotter(path)([one, dataclasses.replace(one, stages_ms={"mask_decoder": bench.Spread(1, 2, 3, 4)})])
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 500
    for wrong in (tmp_path / "stages.txt", tmp_path / "no" / "stages.png"):
        with pytest.raises(BadInput):
            bench.plotter(wrong)
    monkeypatch.setattr(forms.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingPackage):
        bench.plotter(path)


def test_a_curve_is_a_png(fake: FakeModel, tmp_path: Path) -> None:
    result = bench.measure(fake, "a.bundle", threads=1, gen_tokens=2)  # type: ignore[arg-type]
    scored = dataclasses.replace(result, quality={"exact": 90.0}, quality_data="scenes-questions, 10 cases")
    half = dataclasses.replace(scored, image_tokens=2, quality={"exact": 80.0})
    bench.plotter(tmp_path / "curve.png", bench.draw_curve)([scored, half])
    with Image.open(tmp_path / "curve.png") as drawn:
        assert drawn.width > 500
    assert "| exact, %" in forms.render([scored], "md") and "90.00 (scenes-questions, 10 cases)" in forms.render(
        [scored], "md"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--quality", "scenes-nothing"], "no data set 'scenes-nothing'"),
        (["--curve", "c.png"], "--curve needs --quality"),
        (["--curve", "c.png", "--quality", "scenes-questions"], "bundles of different numbers of tokens"),
        (["--quality", "scenes-questions", "--cases", "-1"], "-1 cases score nothing"),
        (["--quality", "scenes-regions"], "takes no boxes"),
        (["--quality", "scenes-grounded"], "gives no masks"),
    ],
)
def test_scores_that_cannot_be(
    options: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [str(tmp_path / option) if option.endswith(".png") else option for option in options]
    assert cli.main(["bench", str(folder), "-r", "1", "--gen-tokens", "2", *options]) == 2
    assert reason in capsys.readouterr().err


def test_command_scores_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(folder), "-r", "1", "--gen-tokens", "2", "--quality", "scenes-questions", "--cases", "3"]
    assert cli.main([*words, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["quality"] == {"exact": 0.0}  # random weights
    assert result["quality_data"] == "scenes-questions, 3 cases"


def test_energy_is_that_of_the_answer(fake: FakeModel) -> None:
    sensor = power.Sensor("a rail", lambda: 12e3)  # a fake answer takes microseconds
    result = bench.measure(fake, "a.bundle", threads=1, gen_tokens=2, sensor=sensor)  # type: ignore[arg-type]
    assert result.energy_j is not None and result.energy_j.min > 0
    assert result.power_sensor == "a rail"
    assert bench.from_document(bench.document([result]), "it") == [result]
    assert "energy, J per answer" in forms.render([result], "md")


def test_several_bundles_are_measured_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(folder), str(folder), "-r", "1", "--gen-tokens", "2", "--threads", "1", "--quiet", "--json"]
    assert cli.main(words) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["bundle"] for result in results] == [str(folder)] * 2
    assert all(result["generated_tokens"] == 2 and result["environment"]["threads"] == 1 for result in results)


def test_options_that_are_zero_reach_the_other_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[str]] = []

    def run(words: list[str], **_: Any) -> SimpleNamespace:
        told.append(words)
        return SimpleNamespace(stdout="", returncode=0)

    monkeypatch.setattr(runs.subprocess, "run", run)
    with pytest.raises(MllmEdgeError):
        bench.measure_apart(folder, {"gpu_layers": 0, "quiet": False, "threads": None, "debug": True})
    assert told[0][-3:] == ["--gpu-layers", "0", "--debug"]


def test_errors_of_the_other_process_arrive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(folder), "nowhere.bundle", "-r", "1", "--threads", "1", "--quiet"]) == 2
    assert capsys.readouterr().err.endswith(
        "is not a bundle (it has no bundle.json); make one with: mllm-edge export\n"
    )


def test_a_process_that_dies_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = SimpleNamespace(stdout="", returncode=-11)
    monkeypatch.setattr(runs.subprocess, "run", lambda *_, **__: dead)
    with pytest.raises(mllm_edge.errors.MllmEdgeError, match="ended with code -11"):
        bench.measure_apart(folder, {})


def test_command_measures_one_bundle(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "stages.png"
    words = ["bench", str(folder), "-r", "1", "--gen-tokens", "2", "--threads", "1", "--plot", str(plot)]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "| vision_encoder, ms" in said.out
    assert "GB/s" in said.out
    assert "| load from disk, ms" in said.out
    assert "[2/2]" in said.err
    assert plot.is_file()


MACHINE = bench.Limits(memory_gb_per_s=10.0, matmul_tflops=0.1)


def test_a_stage_far_below_the_limit_is_marked(fake: FakeModel) -> None:
    result = dataclasses.replace(measured(fake, limits=lambda: MACHINE), share_of_limit={"prefill": 0.1, "decode": 0.4})
    told = bench.render([result], "md")
    assert "10 % of the limit (!)" in told
    assert "40 % of the limit (!)" not in told
    assert "10.0 GB/s" in told
    assert "\x1b[33m10 % of the limit (!)\x1b[0m" in bench.colored(told)


def test_results_survive_their_document(fake: FakeModel) -> None:
    result = measured(fake, limits=lambda: MACHINE, load_cold_ms=12.0)
    document = json.loads(json.dumps(bench.document([result])))
    assert bench.from_document(document, "a.json") == [result]
    for wrong in ({}, [], {"results": [{}]}, {"results": [{**document["results"][0], "odd": 1}]}):
        with pytest.raises(BadInput, match=r"a\.json"):
            bench.from_document(wrong, "a.json")


def test_a_cold_load_is_measured(folder: Path) -> None:
    found = bench.load_cold(folder, lambda: mllm_edge.load(folder, threads=1))
    assert found is None or found > 0


def write_results(path: Path, *results: bench.Result) -> Path:
    path.write_text(json.dumps(bench.document(results)))
    return path


@pytest.fixture
def two_files(fake: FakeModel, tmp_path: Path) -> tuple[Path, Path]:
    old = measured(fake)
    new = dataclasses.replace(old, first_token_ms=bench.Spread(20, 60, 80, 90), load_ms=14.0)
    return write_results(tmp_path / "old.json", old), write_results(tmp_path / "new.json", new)


def test_ratios_are_above_one_where_it_is_worse(two_files: tuple[Path, Path]) -> None:
    ratios = {ratio.measure: ratio for ratio in bench.compare(*two_files)}
    first = ratios["time to first token, ms"]
    assert (first.old, first.new, first.ratio) == (30, 60, 2.0)
    assert (first.low, first.high) == (round(20 / 46, 4), 8.0)  # the fastest new over a slow old, and the reverse
    assert ratios["load again, ms"].ratio == 2.0
    assert ratios["prefill, ms"].ratio == 1.0
    back = {ratio.measure: ratio for ratio in bench.compare(*reversed(two_files))}
    assert back["time to first token, ms"].ratio == 0.5


def test_half_the_rate_is_twice_as_bad(fake: FakeModel, tmp_path: Path) -> None:
    one = measured(fake)
    files = [
        write_results(
            tmp_path / f"{rate}.json",
            dataclasses.replace(one, decode_tokens_per_s=bench.Spread(0.9 * rate, rate, 1.1 * rate, 1.1 * rate)),
        )
        for rate in (100.0, 50.0)
    ]
    decode = {ratio.measure: ratio for ratio in bench.compare(*files)}["decode, tokens/s"]
    assert (decode.old, decode.new, decode.ratio) == (100, 50, 2.0)
    assert decode.low < 2.0 < decode.high


def test_compare_fails_above_a_ratio(two_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", *map(str, two_files)]
    assert cli.main([*words, "--fail-above", "2.5"]) == 0
    assert "WORSE" not in capsys.readouterr().out
    assert cli.main([*words, "--fail-above", "1.5"]) == 1
    said = capsys.readouterr()
    assert "WORSE" in said.out
    assert said.err.startswith("error: worse than 1.5: time to first token, ms of a.bundle (2.00)")
    assert cli.main([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["ratios"]) >= 8


def test_compare_names_the_file_that_is_wrong(two_files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    wrong = two_files[0].parent / "wrong.json"
    for text in ("{", "{}", '{"results": 3}'):
        wrong.write_text(text)
        assert cli.main(["compare", str(two_files[0]), str(wrong)]) == 2
        assert "wrong.json" in capsys.readouterr().err
    assert cli.main(["compare", str(two_files[0]), "nowhere.json"]) == 2
    assert "nowhere.json" in capsys.readouterr().err


def test_bundles_are_compared_by_name(fake: FakeModel, tmp_path: Path) -> None:
    one = measured(fake)
    other, odd = (dataclasses.replace(one, bundle=name) for name in ("b.bundle", "c.bundle"))
    both = write_results(tmp_path / "two.json", one, other)
    assert {r.bundle for r in bench.compare(both, write_results(tmp_path / "b.json", other))} == {"b.bundle"}
    with pytest.raises(BadInput, match="in common"):
        bench.compare(both, write_results(tmp_path / "c.json", odd))


def test_measuring_the_limits_is_not_in_the_peak(fake: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = [100.0]
    monkeypatch.setattr(runs, "peak_rss", lambda: peak[0])

    def greedy() -> bench.Limits:
        peak[0] = 900.0
        return MACHINE

    assert measured(fake, limits=greedy).peak_rss_mb == 100.0
