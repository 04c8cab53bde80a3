"""Engines as stages: which one fits, that the pipeline gives what ONNX Runtime gives, and what goes wrong.

There is no GPU: `fake_gpu` plays CUDA and TensorRT. Real engines are built in tests/export/test_tensorrt.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import Device, install

import mllm_edge
import mllm_edge.runtime
from mllm_edge.bundle.manifest import BuiltEngine, StageEntry
from mllm_edge.bundle.read import file_entry, read_manifest, write_manifest
from mllm_edge.cli import main
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError, OutOfTolerance
from mllm_edge.export.tensorrt import engine as tensorrt
from mllm_edge.export.tensorrt.build import build_bundle
from mllm_edge.machine import facts
from mllm_edge.runtime.engines.tensorrt import packages as tensorrt_packages
from mllm_edge.runtime.engines.tensorrt.cuda import Cuda, DeviceArray
from mllm_edge.scenes import render, sample_scene

SEGMENT = "Please segment the large object in this image."
AXES = {"boxes": [1, 4, 16], "masks": [1, 4, 16]}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install 'mllm-edge[export]'")
    out = tmp_path_factory.mktemp("trt") / "glamm.bundle"
    return mllm_edge.export("glamm", target="trt", devices=["orin-nano", "orin"], out=out, check=False)


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "glamm.bundle"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    install(monkeypatch, device)
    yield device
    device.wait()


def picture(index: int) -> np.ndarray:
    return render(sample_scene("test", index), 160)


def engines(folder: Path) -> mllm_edge.runtime.Model:
    """The bundle by its engines; the language model is on the CPU, where llama.cpp was built without a GPU."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this llama.cpp was built without GPU support")
        return mllm_edge.load(folder, threads=1, gpu_layers=0)


def tensorrt_engine(folder: Path, stage: StageEntry, capability: str) -> BuiltEngine:
    """Some engine of another GPU in the bundle."""
    file = f"{stage.name}.{capability}.engine"
    (folder / file).write_bytes(b"of another GPU")
    entry = dataclasses.asdict(file_entry(folder, file))
    return BuiltEngine(**entry, package="tensorrt", version="10.3.0", capabilities=[capability], graph=stage.sha256)


def test_a_board_builds_its_own_once(folder: Path, gpu: Device) -> None:
    how = read_manifest(folder).build
    assert (how.devices, how.workspace_mb, how.axes) == (["orin-nano", "orin"], 1024, AXES)
    told: list[tuple[str, float | None]] = []
    built = build_bundle(folder, report=lambda step, number, total, seconds, part=0.0: told.append((step, part)))
    assert [one.stage for one in built] == [stage.name for stage in read_manifest(folder).stages]
    assert (built[0].stage, 0.5) in told and (built[0].stage, 1.0) in told
    for stage in read_manifest(folder).stages:
        (engine,) = stage.engines
        assert (engine.package, engine.version, engine.capabilities) == ("tensorrt", "10.3.0", ["sm_87"])
        own = {"region_encoder": ["boxes"], "mask_decoder": ["masks"]}.get(stage.name, [])
        assert engine.axes == {axis: AXES[axis] for axis in own}
    assert (folder / "timing.cache").read_bytes() == b"timed;" * len(built)
    count = len(gpu.builds)
    assert [one.seconds for one in build_bundle(folder)] == [0.0] * len(built)
    assert len(gpu.builds) == count
    assert all(one.seconds > 0 for one in build_bundle(folder, force=True))


def test_an_engine_that_is_not_its_graph_is_taken_out(folder: Path, gpu: Device) -> None:
    manifest = read_manifest(folder)
    other = tensorrt_engine(folder, manifest.stages[0], "sm_89")
    stages = [dataclasses.replace(manifest.stages[0], engines=[other]), *manifest.stages[1:]]
    write_manifest(dataclasses.replace(manifest, stages=stages), folder)
    gpu.fault = 1.0
    with pytest.raises(
        OutOfTolerance, match=r"engine of vision_encoder differs from its graph \(cosine 0\.\d+, at least"
    ):
        build_bundle(folder)
    assert read_manifest(folder).stages[0].engines == [other]  # those of other GPUs stay
    assert [file.name for file in folder.glob("*.engine")] == [other.file]
    gpu.fault = 0.0
    assert [one.cosine for one in build_bundle(folder)] == [pytest.approx(1.0)] * 5
    rows = {row.name: row.measured["cosine"] for row in read_manifest(folder).parity}
    assert rows["mask_decoder on sm_87"] == pytest.approx(1.0)
    assert [one.cosine for one in build_bundle(folder)] == [None] * 5


def test_another_version_replaces_its_engines(folder: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    build_bundle(folder)
    (old,) = read_manifest(folder).stages[0].engines
    install(monkeypatch, gpu, version="11.0.0", typed_flag=False)
    with pytest.raises(MllmEdgeError, match=r"built by tensorrt 10\.3\.0, installed here is tensorrt 11\.0\.0.*build"):
        mllm_edge.load(folder, threads=1)
    build_bundle(folder)
    (new,) = read_manifest(folder).stages[0].engines
    assert new.version == "11.0.0"
    assert not (folder / old.file).exists()


def test_the_pipeline_gives_what_onnx_runtime_gives(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    with mllm_edge.load(folder, "cpu", threads=1) as model:
        expected = [model.generate(SEGMENT, picture(index)) for index in range(3)]
        region = model.generate("What is <bbox>?", picture(1), [(10, 10, 90, 90)]).text
    with engines(folder) as model:
        answers = [model.generate(SEGMENT, picture(index)) for index in range(3)]
        again = model.generate(SEGMENT, picture(0))
        assert model.generate("What is <bbox>?", picture(1), [(10, 10, 90, 90)]).text == region
    assert sum(len(answer.masks) for answer in expected) >= 3
    for answer, wanted in zip([*answers, again], [*expected, expected[0]], strict=True):
        assert answer.tokens.ids == wanted.tokens.ids
        for mask, right in zip(answer.masks, wanted.masks, strict=True):
            assert np.array_equal(mask.pixels, right.pixels)
    assert gpu.launches > 0  # from the second picture on, recorded graphs
    assert not gpu.held


def test_what_goes_from_stage_to_stage_stays_on_the_gpu(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    with engines(folder) as model:
        model.look(picture(0))
        features = model.stages["vision_encoder"](pixel_values=np.zeros((1, 3, 128, 128), np.float32))
        assert all(isinstance(array, DeviceArray) for array in features.values())
        kept = features["image_features"].kept()  # type: ignore[attr-defined]
        first = np.asarray(kept)
        model.stages["vision_encoder"](pixel_values=np.ones((1, 3, 128, 128), np.float32))
        assert np.array_equal(np.asarray(kept), first)
        assert not np.array_equal(np.asarray(features["image_features"]), first)
        del features, kept


def test_more_masks_than_an_engine_takes_come_in_parts(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    states = np.random.default_rng(0).normal(size=(19, 256)).astype(np.float32)
    with mllm_edge.load(folder, "cpu", threads=1) as model:
        spec = model.stages["mask_decoder"].spec
        shape = next(one.shape for one in spec.inputs if one.name != "seg_states")
        embedding = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        wanted = model.stages["mask_decoder"](image_embedding=embedding, seg_states=states)["mask_logits"]
    with engines(folder) as model:
        found = model.stages["mask_decoder"](image_embedding=embedding, seg_states=states)["mask_logits"]
    assert np.allclose(found, wanted, atol=1e-4)


def test_stages_that_wait_for_their_device_are_named(folder: Path, gpu: Device) -> None:
    with pytest.raises(
        MllmEdgeError, match=r"vision_encoder, .* cannot run here: it is not built yet; run: mllm-edge bu"
    ):
        mllm_edge.load(folder, threads=1)


def test_an_engine_for_another_gpu_is_refused(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    gpu.capability = "sm_110"
    with pytest.raises(MllmEdgeError, match="is for sm_87, this GPU is sm_110; run: mllm-edge build"):
        mllm_edge.load(folder, threads=1)
    build_bundle(folder)
    assert [engine.capabilities for engine in read_manifest(folder).stages[0].engines] == [["sm_87"], ["sm_110"]]


def test_a_damaged_engine_is_refused_with_tensorrts_reason(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    manifest = read_manifest(folder)
    engine = manifest.stages[0].engines[0]
    (folder / engine.file).write_bytes(b"?" * engine.bytes)
    entry = dataclasses.replace(engine, **dataclasses.asdict(file_entry(folder, engine.file)))
    stages = [dataclasses.replace(manifest.stages[0], engines=[entry]), *manifest.stages[1:]]
    write_manifest(dataclasses.replace(manifest, stages=stages), folder)
    with pytest.raises(MllmEdgeError, match=r"cannot read it \(Error Code 1: Serialization .*mllm-edge build"):
        mllm_edge.load(folder, threads=1)


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_an_engine_file_that_is_not_whole_is_built_again(damage: str, folder: Path, gpu: Device) -> None:
    file = folder / build_bundle(folder)[0].file
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"?" * file.stat().st_size)
    with pytest.raises(BadInput, match=rf"{file.name} .*; run: mllm-edge build"):
        mllm_edge.load(folder, threads=1)
    mllm_edge.load(folder, "cpu", threads=1).close()  # which needs no engine
    assert [one.seconds > 0 for one in build_bundle(folder)] == [True, False, False, False, False]
    engines(folder).close()


def test_too_little_memory_is_said_before_it_is_taken(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    gpu.memory = 1_200_000
    with pytest.raises(MllmEdgeError, match=r"stage vision_encoder needs \d+ MB of GPU memory for its work, 1 MB are"):
        mllm_edge.load(folder, threads=1)
    assert not gpu.held


def test_an_interrupted_build_keeps_what_was_finished(
    folder: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def report(step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(folder, report=report)
    assert [len(stage.engines) for stage in read_manifest(folder).stages][:3] == [1, 1, 0]
    assert not list(folder.glob(".*"))
    assert [bool(one.seconds) for one in build_bundle(folder)][:3] == [False, False, True]


@pytest.mark.parametrize("caches", ["foreign", "unreadable"])
def test_times_of_another_gpu_or_version_are_measured_anew(caches: str, folder: Path, gpu: Device) -> None:
    (folder / "timing.cache").write_bytes(b"old")
    gpu.caches = caches
    build_bundle(folder)
    assert (folder / "timing.cache").read_bytes() == b"timed;"


def test_ctrl_c_within_a_build_ends_it(folder: Path, gpu: Device) -> None:
    def report(step: str, number: int, total: int, seconds: float | None, part: float = 0.0) -> None:
        if part:
            raise KeyboardInterrupt  # in the middle of TensorRT's callback

    with pytest.raises(KeyboardInterrupt):
        build_bundle(folder, report=report)
    assert not list(folder.glob("*.engine"))


def test_what_cannot_be_recorded_runs_as_it_is(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    gpu.records = False
    with engines(folder) as model:
        answers = [model.generate(SEGMENT, picture(0)).tokens.ids for _ in range(2)]
    assert answers[0] == answers[1]
    assert gpu.launches == 0


def test_staging_memory_is_not_overwritten_while_it_is_read(folder: Path, gpu: Device) -> None:
    """Two calls in a row: the device has not begun the first when the host writes the second's input."""
    build_bundle(folder)
    with mllm_edge.load(folder, "cpu", threads=1) as model:
        wanted = model.stages["vision_encoder"](pixel_values=np.zeros((1, 3, 128, 128), np.float32))
    with engines(folder) as model:
        stage = model.stages["vision_encoder"]
        stage(pixel_values=np.ones((1, 3, 128, 128), np.float32))  # is waited for, and recorded
        first = stage(pixel_values=np.zeros((1, 3, 128, 128), np.float32))["image_features"].kept()  # type: ignore[attr-defined]
        stage(pixel_values=np.ones((1, 3, 128, 128), np.float32))
        assert np.allclose(np.asarray(first), wanted["image_features"], atol=1e-5)
        del first


def test_a_boards_page_cache_is_memory_that_can_be_had(
    gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemFree: 100000 kB\nMemAvailable:    5000000 kB\n")
    monkeypatch.setattr(facts, "MEMINFO", tmp_path / "meminfo")
    assert Cuda().free_memory() == gpu.memory
    gpu.integrated = True
    assert Cuda().free_memory() == 5_120_000_000


def test_a_shape_that_is_refused_is_no_wrong_answer(folder: Path, gpu: Device) -> None:
    build_bundle(folder)
    with engines(folder) as model, pytest.raises(MllmEdgeError, match=r"TensorRT refuses seg_states \[0, 256\]"):
        model.stages["mask_decoder"](
            image_embedding=np.zeros((1, 64, 16, 16), np.float32), seg_states=np.zeros((0, 256), np.float32)
        )


def test_a_tensorrt_that_does_not_load_is_said(folder: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(tensorrt_packages.importlib, "import_module", broken)
    with pytest.raises(MllmEdgeError, match=r"tensorrt-?\w* is installed but does not load \(libnvinfer"):
        build_bundle(folder, ["sm_89"])
    assert "does not load" in str(tensorrt_packages.find(read_manifest(folder).stages[0], "sm_87", AXES))


def test_without_a_driver_there_is_one_line(
    folder: Path, gpu: Device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if int(runtime.cudaGetDeviceCount()[0]) == 0:
        pytest.skip("there is a GPU")
    for words in (["build", str(folder)], ["run", str(folder), "Hello"]):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: there is no NVIDIA GPU that CUDA can use here") and error.count("\n") == 1


def test_without_tensorrt_the_line_that_installs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_packages.Package, "installed", False)
    with pytest.raises(MissingPackage, match=r"mllm-edge\[rtx\]"):
        build_bundle(folder)
    assert "no TensorRT is installed" in str(tensorrt_packages.find(read_manifest(folder).stages[0], "sm_87", AXES))


def test_build_needs_a_bundle_of_target_trt(folder: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(read_manifest(folder), target="cuda")
    write_manifest(other, folder)
    with pytest.raises(BadInput, match="made for cuda, which needs no engines"):
        build_bundle(folder)


def test_engines_for_a_board_are_not_built_elsewhere(folder: Path) -> None:
    with pytest.raises(BadInput, match="built on the board"):
        build_bundle(folder, ["orin"])


def test_ahead_for_a_pc_by_tensorrt_rtx(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'mllm-edge[rtx]'")
    assert main(["build", str(folder), "--device", "sm_89,sm_120", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert all(engine["bytes"] > 100_000 and "sm_89-sm_120" in engine["file"] for engine in document["engines"])
    assert main(["inspect", str(folder)]) == 0
    assert re.search(r"mask_decoder +sm_89, sm_120 +tensorrt-rtx 1", capsys.readouterr().out)


def test_memory_that_is_not_there_is_said(gpu: Device) -> None:
    runtime = Cuda()
    with pytest.raises(MllmEdgeError, match="out of memory"):
        runtime.allocate(10**10)
    runtime.close()


def test_the_smallest_board_decides_the_scratch_memory() -> None:
    assert tensorrt.settings(["thor", "orin"]).workspace_mb == 4096
    assert tensorrt.settings(["thor", "agx-orin", "orin-nx"]).workspace_mb == 2048
    assert tensorrt.settings(["sm_89"]).devices == []
