"""GLaMM's mask encoder as a bundle stage against transformers' `SamModel` in eager PyTorch, in one run.

    python benchmarks/sam_encoder.py [--config 7b] [--repeat 3] [--precision fp32 --precision int8] [--threads 2]

Both have the same random weights, read the same picture and take turns, so that other load affects both equally.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mllm_edge.bundle.manifest import StageEntry, TensorSpec
from mllm_edge.export.onnx.lower import export_stage
from mllm_edge.export.verify.samples import Samples, pictures
from mllm_edge.machine.threads import usable_cores
from mllm_edge.models.blocks.sam import SamDims
from mllm_edge.models.glamm import model as glamm
from mllm_edge.models.glamm import plan as glamm_plan
from mllm_edge.models.resolve import resolve
from mllm_edge.runtime.engines.interface import Options
from mllm_edge.runtime.engines.ort import OnnxStage

THEIRS = (
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"layers.\1.layer_norm\2."),
    (r"^blocks\.", "layers."),
    (r"^neck\.0\.", "neck.conv1."),
    (r"^neck\.1\.", "neck.layer_norm1."),
    (r"^neck\.2\.", "neck.conv2."),
    (r"^neck\.3\.", "neck.layer_norm2."),
)


def transformers_encoder(dims: SamDims, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' vision encoder of SAM with our weights."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=dims.width,
        output_channels=dims.out_width,
        num_hidden_layers=dims.layers,
        num_attention_heads=dims.heads,
        image_size=dims.image_size,
        patch_size=dims.patch_size,
        window_size=dims.window,
        global_attn_indexes=list(dims.global_layers),
        mlp_dim=dims.mlp_width,
        attn_implementation="eager",  # type: ignore[call-arg]
    )
    model = SamVisionEncoder(config).eval()
    renamed = {}
    for name, tensor in state.items():
        for pattern, new in THEIRS:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    model.load_state_dict(renamed)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="7b", choices=list(glamm.CONFIGS))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--precision", action="append", help="of our stage; may be repeated")
    parser.add_argument("--threads", type=int, default=usable_cores())
    arguments = parser.parse_args()
    console = Console()
    torch.set_num_threads(arguments.threads)
    plan = glamm_plan.plan(resolve("glamm", "random", arguments.config))
    stage = next(one for one in plan.stages if one.name == "mask_encoder")
    samples = Samples(plan, pictures(1))
    (feed,) = samples.inputs(stage)
    module = stage.module().eval()
    theirs = transformers_encoder(glamm.CONFIGS[arguments.config].mask_encoder, module.state_dict())
    del module
    with tempfile.TemporaryDirectory() as folder:
        ours = {}
        for precision in arguments.precision or ["fp32"]:
            path = Path(folder) / f"{precision}.onnx"
            console.print(f"lowering to {precision} ...")
            export_stage(stage, path, precision, samples.inputs(stage))
            ours[precision] = OnnxStage(
                path, _entry(stage.name, path, precision, stage.inputs, stage.outputs), _options()
            )
        pixels = torch.from_numpy(feed["mask_pixel_values"])
        times: dict[str, list[float]] = {"transformers": [], **{precision: [] for precision in ours}}
        results: dict[str, np.ndarray] = {}
        for _ in range(arguments.repeat + 1):  # the first is a warm-up
            started = time.perf_counter()
            with torch.no_grad():
                results["transformers"] = theirs(pixels).last_hidden_state.numpy()
            times["transformers"].append(time.perf_counter() - started)
            for precision, engine in ours.items():
                started = time.perf_counter()
                results[precision] = engine(**feed)["image_embedding"]
                times[precision].append(time.perf_counter() - started)
    table = Table("", "median s", "of all", "times as fast", "cosine", title=f"SAM encoder, {arguments.config}")
    base = median(times["transformers"][1:])
    for name, taken in times.items():
        a, b = results[name].ravel().astype(float), results["transformers"].ravel().astype(float)
        cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        spread = " ".join(f"{one:.2f}" for one in taken[1:])
        table.add_row(name, f"{median(taken[1:]):.2f}", spread, f"{base / median(taken[1:]):.2f}", f"{cosine:.6f}")
    console.print(table)


def _entry(name: str, path: Path, precision: str, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> StageEntry:
    return StageEntry(
        file=path.name,
        bytes=0,
        sha256="",
        name=name,
        engine="onnx",
        precision=precision,
        inputs=inputs,
        outputs=outputs,
    )


def _options() -> Options:
    return Options("cpu", False, torch.get_num_threads(), "f16", 1)


if __name__ == "__main__":
    main()
