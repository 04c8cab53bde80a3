"""The commands. Each is a short function that imports what it needs; `main` is the one place where errors are shown."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_edge.errors import BadInput, OutOfTolerance
from mllm_edge.options import (
    Boxes,
    BundleFolder,
    Common,
    Decoding,
    Loading,
    NoVerifyHash,
    Pictures,
    app,
    needs,
    verb,
)
from mllm_edge.show import Interrupted, Screen
from mllm_edge.version import __version__

if TYPE_CHECKING:
    import PIL.Image

    from mllm_edge.bundle import Manifest, Parity
    from mllm_edge.runtime import Answer

# What typer raises for a wrong command line. Its home moved between typer's versions, its place above BadParameter not.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _manifest(folder: Path) -> Manifest:
    from mllm_edge.bundle import read

    return read(folder, verify_hash=False)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mllm-edge {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@verb("systems", "systems --json")
def systems(screen: Screen) -> None:
    """List the systems: tasks, stages, sizes, licenses."""
    from mllm_edge import models
    from mllm_edge.show import system_table

    known = [models.get(name) for name in models.SYSTEMS]
    public = [vars(info) for info in known]
    screen.result({"systems": public}, system_table(known))


@verb("recipes")
def recipes(screen: Screen) -> None:
    """List the recipes that ship."""
    from mllm_edge.recipes.recipe import available
    from mllm_edge.show import pairs

    known = available()
    screen.result({"recipes": known}, pairs("", known))


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
    from mllm_edge.show import pairs

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
    "export SYSTEM --target cuda --weights random --config 1b",
    "export SYSTEM --target trt --device sm_89,orin-nano",
)
def export(
    screen: Screen,
    system: Annotated[str, typer.Argument(metavar="SYSTEM", help="A name from `mllm-edge systems`.")],
    target: Annotated[str, typer.Option(metavar="cpu|cuda|trt", help="Where the bundle will run.")] = "cpu",
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
        str | None, typer.Option(metavar="fp32|fp16|int8", help="Of the stages; by default the target's.")
    ] = None,
    quant: Annotated[
        str, typer.Option(metavar="f32|f16|q8_0|q6_k|q5_k_m|q4_k_m", help="Of the language model.")
    ] = "q8_0",
    device: Annotated[
        str,
        typer.Option(
            metavar="sm_89,...|orin|orin-nano|thor", help="GPUs to build TensorRT engines for.", show_default=False
        ),
    ] = "",
    merge_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Merge a picture's most similar tokens until N are left.")
    ] = None,
    mmproj: Annotated[bool, typer.Option("--mmproj", help="Also write llama.cpp's projector file.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there.")] = False,
) -> None:
    """Make a bundle, verified against PyTorch. It gets its name when it is complete."""
    with needs("export"):
        from mllm_edge.export.export import export as write_bundle

    from mllm_edge.show import parity_table, size

    screen.kept = "finished steps are kept, the same command goes on where it stopped"
    begun = time.monotonic()
    options: dict[str, Any] = {"target": target, "precision": precision, "quant": quant, "out": out, "force": force}
    options |= {"merge_tokens": merge_tokens, "mmproj": mmproj, "devices": [name for name in device.split(",") if name]}
    with screen.steps() as report:
        folder = write_bundle(system, weights, config, **options, report=report)
    seconds, manifest = time.monotonic() - begun, _manifest(folder)
    count = sum(entry.bytes for entry in manifest.files())
    parity = [dataclasses.asdict(row) for row in manifest.parity]
    screen.aside(parity_table(manifest.parity))
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
        str, typer.Option(metavar="sm_89,...", help="Build ahead for these GPUs, by TensorRT-RTX.", show_default=False)
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Build again what is there.")] = False,
) -> None:
    """Build a bundle's TensorRT engines. On the device that will run them; what is there and fits stays."""
    from mllm_edge.export.tensorrt.build import build_bundle
    from mllm_edge.show import engine_table

    screen.kept = "finished engines are kept, the same command goes on with the others"
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
    with needs("export"):
        from mllm_edge.export.verify.verify import verify_bundle

    from mllm_edge.show import parity_table

    def show(rows: list[Parity], passed: bool) -> None:
        document = {"bundle": str(bundle), "passed": passed, "parity": [dataclasses.asdict(row) for row in rows]}
        screen.result(document, parity_table(rows))

    try:
        show(verify_bundle(bundle, weights), True)
    except OutOfTolerance:
        show(_manifest(bundle).parity, False)
        raise


@verb("inspect my.bundle", "inspect my.bundle --json")
def inspect_(screen: Screen, bundle: BundleFolder, no_verify_hash: NoVerifyHash = False) -> None:
    """Show what is inside a bundle."""
    from mllm_edge.bundle import read
    from mllm_edge.show import bundle_tables

    manifest = read(bundle, verify_hash=not no_verify_hash)
    screen.result(dataclasses.asdict(manifest), *bundle_tables(bundle, manifest))


@verb(
    'run my.bundle "What is in the picture?" --image scene.png',
    'run my.bundle "What differs?" --image a.png --image b.png --stream',
    'run my.bundle "Please segment the red circle in this image." --image scene.png --out answer',
    'run my.bundle "What is <bbox>?" --image scene.png --box 10,20,110,90',
    'run my.bundle "USER: <image> Caption: ASSISTANT:" --image scene.png --raw --json',
)
def run(
    screen: Screen,
    loading: Loading,
    decoding: Decoding,
    bundle: BundleFolder,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="By default what stdin says.")] = None,
    image: Pictures = None,
    box: Boxes = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where pictures of the answer go.")] = None,
    teacher_forced: Annotated[
        str | None, typer.Option(metavar="ANSWER", help="Do not write; cut out the masks of this answer's [SEG].")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it comes.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="PROMPT is the whole text; no template.")] = False,
) -> None:
    """Ask a bundle once. The answer goes to stdout, its times to stderr."""
    question = prompt if prompt is not None else _piped()
    pictures, boxes = _pictures(image), _boxes(box)
    with loading.open(bundle) as model:
        if out and not model.gives_masks:
            raise BadInput(f"{bundle} ({', '.join(model.manifest.tasks)}) answers with text alone; leave out --out")
        if loading.memory_budget:
            screen.aside(str(model.residence))
        pieces = model.stream(question, pictures, boxes, raw=raw, teacher_forced=teacher_forced, **vars(decoding))
        stream = stream and not screen.as_json and teacher_forced is None
        answer = _shown(screen, pieces, stream)
    if not stream:
        screen.result(answer.to_json(), answer.text)
    _write_masks(screen, answer, pictures, out)
    screen.times(answer)


@verb("chat my.bundle --image scene.png", "chat my.bundle --image scene.png --temperature 0.7 --seed 1")
def chat(
    screen: Screen,
    loading: Loading,
    decoding: Decoding,
    bundle: BundleFolder,
    image: Pictures = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where pictures of the answers go.")] = None,
) -> None:
    """Ask in turns about pictures. They are encoded once; /image FILE shows another, /box x1,y1,x2,y2 gives a region to
    the next question, /quit or Ctrl-D ends."""
    screen.kept = "the dialogue is not kept"
    pictures, boxes = _pictures(image), _boxes(None)
    looked_at = pictures[-1:]
    turns: list[dict[str, Any]] = []
    with loading.open(bundle) as model:
        dialogue = model.chat(**vars(decoding))
        while (line := screen.question("> ")) is not None and (text := line.strip()) != "/quit":
            command, _, argument = text.partition(" ")
            with screen.turn():
                if command == "/image":
                    pictures += _pictures([Path(argument.strip())])
                    looked_at = pictures[-1:]
                elif command == "/box":
                    boxes += _boxes([argument.strip()])
                elif text:
                    answer = _shown(screen, dialogue.stream(text, pictures, boxes), not screen.as_json)
                    turns.append({"prompt": text, **answer.to_json()})
                    pictures, boxes = [], []
                    _write_masks(screen, answer, looked_at, out and out / f"turn_{len(turns)}")
                    screen.times(answer)
    if screen.as_json:
        screen.result({"turns": turns})


@verb("doctor", "doctor --json")
def doctor(screen: Screen) -> None:
    """Say what this machine has and lacks. What is missing comes with the line that installs it."""
    from mllm_edge.doctor import examine, tables

    findings = examine()
    screen.result(findings.to_json(), *tables(findings))


def _boxes(texts: list[str] | None) -> list[list[float]]:
    """Boxes as they are typed."""
    boxes = []
    for text in texts or []:
        try:
            boxes.append([float(value) for value in text.split(",")])
        except ValueError:
            raise BadInput(f"{text!r} is no box; write it as x1,y1,x2,y2 in pixels") from None
    return boxes


def _write_masks(screen: Screen, answer: Answer, pictures: list[PIL.Image.Image], out: Path | None) -> None:
    """The answer's pictures under `out`; an answer without masks leaves none, and says so."""
    if out and pictures and answer.masks:
        from mllm_edge.runtime.answers.write import write_pictures

        files = write_pictures(answer, pictures[-1], out)
        screen.aside(f"wrote {files[0]} and {len(answer.masks)} mask(s) beside it")
    elif out:
        screen.aside(f"the answer has no masks, so nothing is written to {out}")


def _pictures(paths: list[Path] | None) -> list[PIL.Image.Image]:
    """Read pictures before anything large is loaded."""
    from mllm_edge.runtime.images import load_image

    return [load_image(path) for path in paths or []]


def _piped() -> str:
    text = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    if not text:
        raise BadInput("there is no prompt; write it behind the bundle, or pipe it in")
    return text


def _shown(screen: Screen, items: Iterator[str | Answer], show: bool) -> Answer:
    """The answer at the end of a stream, whose pieces are shown as they come."""
    for item in items:
        if not isinstance(item, str):
            if show:
                screen.text("\n")
            return item
        if show:
            screen.text(item)
    raise AssertionError("a stream ends with an Answer")


from mllm_edge import cli_bench  # noqa: E402, F401  its commands come behind those above


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. The only place where any error is caught."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    screen = Screen(**{field.name: f"--{field.name}" in options for field in dataclasses.fields(Common)})
    try:
        code = typer.main.get_command(app).main(words, "mllm-edge", standalone_mode=False, obj=screen)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UsageError as error:
        return screen.error(BadInput(_usage(error)))
    except KeyboardInterrupt:  # before or behind the command itself
        return screen.error(Interrupted("interrupted"))
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        _drop_stdout()
        return 1
    except Exception as error:  # noqa: BLE001  the boundary: whatever it is becomes one line
        try:
            sys.stdout.flush()
        except OSError:  # a full disk behind stdout
            _drop_stdout()
        return screen.error(error)


def _drop_stdout() -> None:
    """What is still buffered cannot be written; Python would try once more at its end, with a traceback."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: Exception) -> str:
    """Typer's message as one line in our form: what is wrong; what to do."""
    what = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    what, question, near = what.partition(". Did you mean ")
    context = getattr(error, "ctx", None)
    hint = (
        f"did you mean {near.partition('?')[0]}?"
        if question
        else f"see: {context.command_path if context else 'mllm-edge'} --help"
    )
    return f"{what[:1].lower()}{what[1:]}; {hint}"
