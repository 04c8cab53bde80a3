"""The commands that make and check bundles: train, export, build, verify."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_edge import models
from mllm_edge.commands.frame import BundleFolder, needs, verb
from mllm_edge.commands.screen import Screen
from mllm_edge.errors import OutOfTolerance, look_up
from mllm_edge.quants import ENGINES, ONNX_QUANTS, PRECISIONS, QUANTS
from mllm_edge.targets import BUNDLES

if TYPE_CHECKING:
    from mllm_edge.bundle.manifest import Manifest, Parity


@verb("train RECIPE", "train RECIPE lora.r=64 lr=2e-4", "train my-recipe.yaml --resume")
def train(
    screen: Screen,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name or a YAML file.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to replace.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved state.")] = False,
) -> None:
    """Train one part of a system by a recipe. KEY=VALUE replaces the recipe's settings."""
    from mllm_edge.recipes import train as run_recipe
    from mllm_edge.tables import pairs

    screen.kept = "the last saved state is kept, go on from it with --resume"
    if os.environ.get("RANK", "0") != "0":  # another process of `accelerate launch` reports
        run_recipe(recipe, settings or [], resume, lambda *_: None)
        return
    with screen.training() as report:
        result = run_recipe(recipe, settings or [], resume, report)
    screen.result(result, pairs("", {name: str(value) for name, value in result.items()}))


@verb(
    "export SYSTEM --target cpu",
    "export SYSTEM --target cpu --weights HUB_ID --quant q4_k_m -o small.bundle",
    "export SYSTEM --target cpu --llm onnx --quant int4 -o without-llama.cpp.bundle",
    "export SYSTEM --target cuda --weights random --config 1b",
    "export SYSTEM --target trt --device sm_89,orin-nano",
)
def export(
    screen: Screen,
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="A name from `mllm-edge systems`.")],
    target: Annotated[str, typer.Option(metavar="|".join(BUNDLES), help="Where the bundle will run.")] = "cpu",
    weights: Annotated[
        str, typer.Option(metavar="random|PATH|HUB_ID", help="By default the ones that come with the package.")
    ] = "",
    config: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of shipped or random weights; a checkpoint brings its own.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="By default SYSTEM-CONFIG.bundle.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="|".join(PRECISIONS), help="Of the stages; by default the target's.")
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option(
            metavar="|".join((*QUANTS, *ONNX_QUANTS)),
            help="Of the language model; by default q8_0 for gguf, int8 for onnx.",
        ),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(ENGINES),
            help="What runs the language model: llama.cpp, by default where it can, or ONNX Runtime.",
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="sm_89|NAME,...",
            help="GPUs to build TensorRT engines for: compute capabilities, or devices of `plan`.",
            show_default=False,
        ),
    ] = "",
    merge_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Merge a picture's most similar tokens until N are left.")
    ] = None,
    mmproj: Annotated[bool, typer.Option("--mmproj", help="Also write llama.cpp's projector file.")] = False,
    template: Annotated[
        str, typer.Option(metavar="NAME", help="Of the prompt; by default the checkpoint's own.", show_default=False)
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
) -> None:
    """Make a bundle, verified against PyTorch. It gets its name when it is complete."""
    # Words first: a typing error should not send anyone to install PyTorch.
    info = models.get(system)
    look_up("target", target, BUNDLES)
    if quant is not None:
        look_up("quantization", quant, {**QUANTS, **ONNX_QUANTS})
    if precision is not None:
        look_up("precision", precision, PRECISIONS)
    if config is not None:
        look_up(f"config of {system}", config, info.configs)
    with needs("export"):
        from mllm_edge.export.export import export as write_bundle

    from mllm_edge.commands.shown import parity_table
    from mllm_edge.tables import size

    screen.kept = "finished steps are kept, the same command continues where it stopped"
    started = time.monotonic()
    options: dict[str, Any] = {
        "target": target,
        "precision": precision,
        "quant": quant,
        "llm": llm,
        "out": out,
        "force": force,
    }
    options |= {"template": template, "merge_tokens": merge_tokens, "mmproj": mmproj}
    options |= {"devices": [name for name in device.split(",") if name]}
    with screen.steps() as report:
        folder = write_bundle(system, weights, config, **options, report=report)
    seconds, manifest = time.monotonic() - started, _manifest(folder)
    count = sum(entry.bytes for entry in manifest.files())
    parity = [dataclasses.asdict(row) for row in manifest.parity]
    screen.aside(parity_table(manifest.parity))
    reason = manifest.source.get("prompt")
    other = "" if template else "; --template chooses another"
    screen.aside(f"prompt: {manifest.prompt.name}" + (f" ({reason}{other})" if reason else ""))
    then = f"ask it: mllm-edge run {folder} 'What is this?' --image FILE"
    if manifest.build.devices:
        then = f"on the board: mllm-edge build {folder}"
    screen.aside(f"{size(count)} in {seconds:.1f} s; {then}")
    screen.result({"bundle": str(folder), "seconds": round(seconds, 3), "bytes": count, "parity": parity}, str(folder))


@verb("build my.bundle", "build my.bundle --device sm_89,sm_120")
def build(
    screen: Screen,
    bundle: BundleFolder,
    device: Annotated[
        str,
        typer.Option(metavar="sm_89|NAME,...", help="Build ahead for these GPUs, by TensorRT-RTX.", show_default=False),
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
) -> None:
    """Build a bundle's TensorRT engines. On the device that will run them; what is there and fits stays."""
    from mllm_edge.commands.shown import engine_table
    from mllm_edge.export.tensorrt.build import build_bundle

    screen.kept = "finished engines are kept, the same command continues with the others"
    with screen.steps() as report:
        built = build_bundle(bundle, [name for name in device.split(",") if name], force, report)
    screen.result({"bundle": str(bundle), "engines": [dataclasses.asdict(one) for one in built]}, engine_table(built))


@verb("verify my.bundle", "verify my.bundle --weights ~/checkpoint")
def verify(
    screen: Screen,
    bundle: BundleFolder,
    weights: Annotated[str | None, typer.Option(metavar="PATH|HUB_ID", help="Where its weights are now.")] = None,
) -> None:
    """Compare a bundle with PyTorch. Per stage and end to end; exit code 1 when it is out of tolerance."""
    _manifest(bundle)
    with needs("export"):
        from mllm_edge.export.verify.verify import verify_bundle

    from mllm_edge.commands.shown import parity_table

    def show(rows: list[Parity], passed: bool) -> None:
        document = {"bundle": str(bundle), "passed": passed, "parity": [dataclasses.asdict(row) for row in rows]}
        screen.result(document, parity_table(rows))

    try:
        show(verify_bundle(bundle, weights), True)
    except OutOfTolerance:
        show(_manifest(bundle).parity, False)
        raise


def _manifest(folder: Path) -> Manifest:
    from mllm_edge.bundle.read import read_manifest

    return read_manifest(folder, verify_hash=False)
