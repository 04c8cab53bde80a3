"""TensorRT-RTX builds engines here, without a GPU; what they hold can be read back only with one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import mllm_edge
from mllm_edge.bundle.manifest import BuildSettings, TensorSpec
from mllm_edge.bundle.read import read_manifest
from mllm_edge.errors import BadInput, MissingPackage, MllmEdgeError
from mllm_edge.export.onnx.language_model import export_part
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.export.tensorrt import engine as tensorrt
from mllm_edge.export.tensorrt.build import build_bundle
from mllm_edge.export.verify.difference import compare
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.models.glamm import plan as glamm_plan
from mllm_edge.models.llava import plan as llava_plan
from mllm_edge.models.plan import StageExport
from mllm_edge.models.resolve import resolve
from mllm_edge.runtime.answers.resize import iou
from mllm_edge.runtime.engines.tensorrt.cuda import Cuda
from mllm_edge.runtime.engines.tensorrt.packages import RTX
from mllm_edge.runtime.engines.tensorrt.stage import shape
from mllm_edge.scenes import render, sample_scene

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install 'mllm-edge[rtx]'")

GPUS = ["sm_86", "sm_89", "sm_120"]


def stages() -> list[tuple[str, StageExport]]:
    plans = {
        "llava tiny": llava_plan.plan(resolve("llava", "", None)),
        "glamm tiny": glamm_plan.plan(resolve("glamm", "", None)),
    }
    found = [(f"{name} {stage.name}", stage) for name, plan in plans.items() for stage in plan.stages]
    full = {stage.name: stage for stage in glamm_plan.plan(resolve("glamm", "random", "7b-lite")).stages}
    return [*found, ("CLIP-L/14-336", full["vision_encoder"]), ("SAM ViT-B", full["mask_encoder"])]


@pytest.mark.parametrize(("name", "stage"), stages(), ids=[name for name, _ in stages()])
def test_every_stage_builds_for_three_gpus(name: str, stage: StageExport, tmp_path: Path) -> None:
    path = tmp_path / f"{stage.name}.onnx"
    export_stage(stage, path, "fp16" if "fp16" in stage.precisions else "fp32")
    told: list[float] = []
    work = tensorrt.Work(path, stage.inputs, stage.outputs, GPUS)
    engine = tensorrt.build(work, RTX, settings(stage.inputs), progress=told.append)
    assert len(engine) > 100_000
    assert told == sorted(told)
    assert 0 < told[-1] <= 1


def test_int8_builds_too(tmp_path: Path) -> None:
    plan = glamm_plan.plan(resolve("glamm", "", None))
    samples = Samples(plan, pictures(4))
    quantized = [stage for stage in plan.stages if "int8" in stage.precisions]
    assert len(quantized) == 3
    for stage in quantized:
        path = tmp_path / f"{stage.name}.onnx"
        export_stage(stage, path, "int8", samples.inputs(stage), for_tensorrt=True)
        assert len(build(path, stage.inputs, stage.outputs))
        rounded, exact = onnxruntime.InferenceSession(path), samples.outputs(stage)[0]
        for name, found in zip(exact, rounded.run(list(exact), samples.inputs(stage)[0]), strict=True):
            assert compare(found, exact[name])["cosine"] > 0.99


@pytest.mark.parametrize("quant", ["fp16", "int8", "int4"])
def test_a_language_models_parts_build(quant: str, tmp_path: Path) -> None:
    """As engines take weights: fp16, or 8 and 4 bits of weights alone, which stay near the fp32 graph."""
    parts = {part.name: part for part in llava_plan.plan(resolve("llava", "", None)).language_model.parts}
    decoder, axes = parts["decoder"], tensorrt.language_model_axes(context=64, beams=1)
    exact, path = tmp_path / "fp32.onnx", tmp_path / "decoder.onnx"
    export_part(decoder, exact, "fp32")
    export_part(decoder, path, quant, for_tensorrt=True)
    work = tensorrt.Work(path, decoder.inputs, decoder.outputs, ["sm_89"])
    assert len(tensorrt.build(work, RTX, BuildSettings(axes=axes))) > 100_000
    random = np.random.default_rng(0)
    lengths = {"sequences": 2, "tokens": 3, "capacity": 8}
    feed = {spec.name: random.normal(size=shape(spec, lengths)).astype(spec.dtype) for spec in decoder.inputs}
    feed["length"] = np.array([5])
    wanted, found = (onnxruntime.InferenceSession(file).run(["logits"], feed)[0] for file in (exact, path))
    assert compare(found, wanted)["cosine"] > {"fp16": 0.9999, "int8": 0.999, "int4": 0.97}[quant]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageExport]:
    stage = llava_plan.plan(resolve("llava", "", None)).stages[1]
    path = tmp_path_factory.mktemp("small") / "connector.onnx"
    export_stage(stage, path, "fp32")
    return path, stage


def build(onnx: Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bytes:
    return tensorrt.build(tensorrt.Work(onnx, inputs, outputs, ["sm_89"]), RTX, settings(inputs))


def settings(inputs: Sequence[TensorSpec]) -> BuildSettings:
    """With the lengths that export gives to axes that vary."""
    return BuildSettings(
        axes={size: list(tensorrt.AXIS) for spec in inputs for size in spec.shape if isinstance(size, str)}
    )


def test_a_node_that_the_parser_refuses_is_named(small: tuple[Path, StageExport], tmp_path: Path) -> None:
    model = onnx.load(small[0])
    model.graph.node[0].op_type = "Blorp"
    onnx.save(model, tmp_path / "connector.onnx")
    with pytest.raises(MllmEdgeError, match=rf"connector: TensorRT cannot read {model.graph.node[0].name} \(Blorp"):
        build(tmp_path / "connector.onnx", small[1].inputs, small[1].outputs)


def test_a_network_that_is_not_the_manifests_is_refused(small: tuple[Path, StageExport]) -> None:
    other = [TensorSpec("image_embeds", "float32", [1, 2, 3])]
    with pytest.raises(MllmEdgeError, match="TensorRT's network gives"):
        build(small[0], small[1].inputs, other)


@pytest.mark.parametrize(
    ("target", "devices", "reason"),
    [
        ("trt", ["sm_12"], "TensorRT-RTX builds no engines for sm_12; use .*sm_89"),
        ("trt", ["orin-ano"], "no device 'orin-ano'; did you mean 'orin-nano' or"),
        ("trt", ["raspberry-pi-5"], "raspberry-pi-5 has no GPU"),
        ("cpu", ["sm_89"], "goes with --target trt"),
    ],
)
def test_devices_that_cannot_be(target: str, devices: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=reason):
        mllm_edge.export("llava", target=target, devices=devices, out=tmp_path / "x.bundle")


def test_without_devices_it_is_for_the_gpu_that_is_here_or_usual_ones() -> None:
    with pytest.warns(RuntimeWarning, match="built for sm_89; name other GPUs"):
        assert tensorrt.usual_devices("sm_89") == ["sm_89"]
    for here in ("", "sm_90"):  # none, or one that TensorRT-RTX does not know
        with pytest.warns(RuntimeWarning, match="built for sm_86, sm_89, sm_120"):
            assert tensorrt.usual_devices(here) == GPUS


def test_devices_by_name_stand_for_their_gpu() -> None:
    assert tensorrt.ahead(["rtx-4060-laptop", "sm_89", "sm_86", "dgx-spark", "orin"]) == ["sm_86", "sm_89"]


def test_without_the_package_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingPackage, match=r"mllm-edge\[rtx\]"):
        tensorrt.ahead(["sm_89"])


def test_a_bundle_of_engines(tmp_path: Path) -> None:
    folder = mllm_edge.export("llava", target="trt", devices=["sm_89", "orin"], out=tmp_path / "l.bundle")
    manifest = read_manifest(folder)
    assert manifest.target == "trt"
    for stage in manifest.stages:
        assert (stage.engine, stage.precision) == ("tensorrt", "fp16")
        (engine,) = stage.engines
        assert (engine.capabilities, engine.package, engine.graph) == (["sm_89"], "tensorrt-rtx", stage.sha256)
        assert (folder / engine.file).stat().st_size == engine.bytes
    with mllm_edge.load(folder, "cpu", threads=1) as model:
        assert model.generate("What is in the picture?", max_tokens=2).tokens.generated


def test_engines_made_at_export_have_the_lengths_of_their_own_axes(tmp_path: Path) -> None:
    folder = mllm_edge.export("glamm", target="trt", devices=["sm_89"], out=tmp_path / "g.bundle", check=False)
    manifest = read_manifest(folder)
    assert manifest.build.axes == {"boxes": [1, 4, 16], "masks": [1, 4, 16]}
    varying = {"region_encoder": {"boxes": [1, 4, 16]}, "mask_decoder": {"masks": [1, 4, 16]}}
    for stage in manifest.stages:
        assert [engine.axes for engine in stage.engines] == [varying.get(stage.name, {})]


def test_engines_run_where_their_gpu_is(tmp_path: Path) -> None:
    try:
        capability = Cuda().capability
    except MllmEdgeError as error:
        pytest.skip(f"engines can be read only where there is an NVIDIA GPU ({error})")
    folder = mllm_edge.export("glamm", target="trt", devices=["orin"], out=tmp_path / "g.bundle")
    assert all(one.cosine is not None and one.cosine > 0.999 for one in build_bundle(folder))
    assert [engine.capabilities for engine in read_manifest(folder).stages[0].engines] == [[capability]]
    picture = render(sample_scene("test", 0), 256)
    answers = []
    for target in ("cpu", "trt"):
        with mllm_edge.load(folder, target, threads=1, gpu_layers=0) as model:
            answers.append(model.generate("Please segment the large object in this image.", picture))
    assert answers[0].tokens.ids == answers[1].tokens.ids
    assert iou(answers[0].masks[0].pixels, answers[1].masks[0].pixels) > 0.97


def test_a_board_builds_its_own(tmp_path: Path) -> None:
    folder = mllm_edge.export("llava", target="trt", devices=["orin"], out=tmp_path / "l.bundle")
    assert [stage.engines for stage in read_manifest(folder).stages] == [[], []]
