"""A step of Stable Diffusion 1.5's UNet with guidance, and its picture's decoding: our stages beside diffusers.

    python benchmarks/diffusion.py prepare build/sd15 [--only "ours fp32"]
    python benchmarks/diffusion.py run build/sd15 [--threads 2] [--rounds 3] [--only "ours fp32"] [--json FILE]

The weights are random and the same for all, saved once by diffusers. A step is a batch of two, with the text and
without it. Every runtime has a process of its own, one after another; the first round does not count, medians of the
others are told. Memory is the most that a process ever held. The cosine compares the noise with diffusers' in float32.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mllm_edge.bundle.manifest import StageEntry, TensorSpec
from mllm_edge.bundle.sources import FileEntry
from mllm_edge.machine.facts import cpu_name

OURS = ("fp32", "int8")
THEIRS = ("float32", "bfloat16", "compiled")
RUNTIMES = (*(f"ours {form}" for form in OURS), *(f"diffusers {form}" for form in THEIRS))
INPUTS = {
    "unet": [
        TensorSpec("latent", "float32", [2, 4, 64, 64]),
        TensorSpec("timestep", "float32", [1]),
        TensorSpec("text", "float32", [2, 77, 768]),
    ],
    "vae_decoder": [TensorSpec("decoded", "float32", [1, 4, 64, 64])],
}
OUTPUTS = {
    "unet": [TensorSpec("noise", "float32", [2, 4, 64, 64])],
    "vae_decoder": [TensorSpec("pixels", "float32", [1, 3, 512, 512])],
}
REFERENCE = "noise.npy"
Array = np.ndarray[Any, Any]
Runner = Callable[[str, dict[str, Array]], Array]


def library() -> Any:
    """diffusers, whose classes have no types."""
    import diffusers

    return diffusers


def feeds() -> dict[str, dict[str, Array]]:
    """Inputs of both stages."""
    random = np.random.default_rng(0)
    made = {
        stage: {spec.name: random.standard_normal([int(n) for n in spec.shape], np.float32) for spec in specs}
        for stage, specs in INPUTS.items()
    }
    made["unet"]["timestep"] = np.array([500], np.float32)
    return made


def entry(folder: Path, stage: str, form: str) -> StageEntry:
    """What our runtime is told of a stage's file."""
    file = f"{stage}-{form}.onnx"
    return StageEntry(
        file=file,
        bytes=(folder / file).stat().st_size if (folder / file).is_file() else 0,
        sha256="",
        name=stage,
        engine="onnx",
        precision=form,
        inputs=INPUTS[stage],
        outputs=OUTPUTS[stage],
        data_files=[FileEntry(path.name, path.stat().st_size, "") for path in folder.glob(f"{file}.data")],
    )


def prepare(folder: Path, forms: Sequence[str]) -> None:
    """Write diffusers' checkpoint and our stages of it in these forms (int8 of the UNet: more than 11 GB of memory)."""
    import torch

    from mllm_edge.export.onnx.lower import export_stage
    from mllm_edge.models.blocks.unet import FLOAT32, UNet, UNetDims
    from mllm_edge.models.blocks.vae import VaeDecoder, VaeDims
    from mllm_edge.models.plan import StageExport

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if not (folder / "vae" / "config.json").is_file():
        library().UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).save_pretrained(folder / "unet")
        widths, kinds = (128, 256, 512, 512), 4
        library().AutoencoderKL(
            block_out_channels=widths,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * kinds,
            up_block_types=("UpDecoderBlock2D",) * kinds,
        ).save_pretrained(folder / "vae")

    def unet() -> torch.nn.Module:
        held = library().UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
        made = UNet(UNetDims())
        made.load_state_dict(held)
        return made

    def decoder() -> torch.nn.Module:
        held = library().AutoencoderKL.from_pretrained(folder / "vae").state_dict()
        made = VaeDecoder(VaeDims())
        made.load_state_dict({name: held[name] for name in made.state_dict()})
        return made

    for stage, make in (("unet", unet), ("vae_decoder", decoder)):
        lowered = StageExport(stage, make, INPUTS[stage], OUTPUTS[stage], float32=FLOAT32)
        for form in forms:
            path = folder / entry(folder, stage, form).file
            if not path.is_file():
                print(f"lowering {stage} to {form} ...", flush=True)
                export_stage(lowered, path, form, [feeds()[stage]])


def ours(folder: Path, form: str, threads: int) -> Runner:
    """Our runtime's stages."""
    from mllm_edge.runtime.engines.interface import Options
    from mllm_edge.runtime.engines.ort import OnnxStage

    options = Options("cpu", False, threads, "f16", 1)
    made = {}
    for stage in INPUTS:
        one = entry(folder, stage, form)
        made[stage] = OnnxStage(folder / one.file, one, options)
    return lambda stage, feed: made[stage](**feed)[OUTPUTS[stage][0].name]


def theirs(folder: Path, form: str, threads: int) -> Runner:
    """diffusers' own modules."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    unet = library().UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).eval()
    vae = library().AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).eval()
    predict, decode = unet.forward, vae.decode
    if form == "compiled":
        predict, decode = torch.compile(unet.forward), torch.compile(vae.decode)

    @torch.inference_mode()
    def run(stage: str, feed: dict[str, Array]) -> Array:
        given = {name: torch.from_numpy(array).to(dtype) for name, array in feed.items()}
        if stage == "unet":
            found = predict(given["latent"], given["timestep"], given["text"]).sample
        else:
            found = decode(given["decoded"]).sample
        array: Array = found.float().numpy()
        return array

    return run


def worker(folder: Path, name: str, threads: int, rounds: int) -> None:
    """One runtime's row on the standard output; the first round warms up."""
    who, _, form = name.partition(" ")
    run = (ours if who == "ours" else theirs)(folder, form, threads)
    row: dict[str, Any] = {"runtime": name}
    for stage, feed in feeds().items():
        seconds, found = [], np.zeros(0)
        for _ in range(rounds + 1):
            began = time.perf_counter()
            found = run(stage, feed)
            seconds.append(time.perf_counter() - began)
        row[f"{stage}_s"] = statistics.median(seconds[1:])
        if stage == "unet":
            if name == "diffusers float32":
                np.save(folder / REFERENCE, found)
            wanted = np.load(folder / REFERENCE).ravel().astype(float)
            flat = found.ravel().astype(float)
            row["cosine"] = float(flat @ wanted / np.linalg.norm(flat) / np.linalg.norm(wanted))
    print(json.dumps({**row, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "run", "worker"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", choices=RUNTIMES, help="may be repeated")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "prepare":
        prepare(options.folder, [form for form in OURS if not options.only or f"ours {form}" in options.only])
        return
    if options.what == "worker":
        worker(options.folder, options.only[0], options.threads, options.rounds)
        return
    table = Table(title=f"{cpu_name()}, {options.threads} threads")
    for column in ("runtime", "step, s", "decoding, s", "most memory, MB", "cosine"):
        table.add_column(column, justify="left" if column == "runtime" else "right")
    rows = []
    for name in sorted(options.only or RUNTIMES, key=lambda one: one != "diffusers float32"):  # it is compared with
        command = [sys.executable, __file__, "worker", str(options.folder), "--only", name]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        rows.append(row)
        numbers = (f"{row['unet_s']:.2f}", f"{row['vae_decoder_s']:.2f}", f"{row['peak_mb']:.0f}")
        table.add_row(name, *numbers, f"{row['cosine']:.6f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"machine": cpu_name(), "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
