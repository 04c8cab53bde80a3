"""The command line's frame: options that commands share, and how a function becomes a command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import typing
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm_edge.errors import BadInput, MissingPackage
from mllm_edge.quants import KV_TYPES
from mllm_edge.targets import TARGETS

if TYPE_CHECKING:
    from mllm_edge.runtime import Model
    from mllm_edge.runtime import turn as runtime_turn
    from mllm_edge.runtime.embedding import Embedder

BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.", show_default=False)]
Pictures = Annotated[list[Path] | None, typer.Option("--image", metavar="FILE", help="A picture; may be repeated.")]
Boxes = Annotated[
    list[str] | None,
    typer.Option(
        "--box",
        metavar="x1,y1,x2,y2",
        help="A region in pixels, for the placeholder that `inspect` names; may be repeated.",
    ),
]
TaskName = Annotated[
    str, typer.Option("--task", metavar="NAME", help="One of the bundle's tasks; by default as the question sounds.")
]
Tags = Annotated[
    str | None,
    typer.Option(
        "--tags", metavar="A,B,...", help="What is in the picture, instead of what the bundle's tagger finds."
    ),
]
NoVerifyHash = Annotated[bool, typer.Option("--no-verify-hash", help="Do not compare the files' hashes.")]


@dataclass(frozen=True)
class Common:
    """Options of every command. `main` reads them, so that errors in the command line follow them too."""

    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the result, warnings and errors.")] = False
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and libraries' warnings.")] = False


@dataclass(frozen=True)
class Embedding:
    """Options of commands that run the stages of a bundle which see pictures; see `runtime.embedding.Embedder`."""

    target: Annotated[
        str | None,
        typer.Option(metavar="|".join(TARGETS), help="Where to run; if that is not possible, it is an error."),
    ] = None
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default the physical cores.")] = None
    no_verify_hash: NoVerifyHash = False

    def embedder(self, bundle: Path) -> Embedder:
        """Load them so."""
        from mllm_edge.runtime.embedding import Embedder

        return Embedder(bundle, self.target, self.threads, not self.no_verify_hash)


@dataclass(frozen=True)
class Loading(Embedding):
    """Options of commands that run a bundle; see `mllm_edge.load`."""

    context: Annotated[
        int | None,
        typer.Option(help="Most tokens of prompt and answer, pictures included; by default the bundle's, up to 4096."),
    ] = None
    gpu_layers: Annotated[
        int | None, typer.Option(help="Layers of the language model on a GPU; by default what fits.")
    ] = None
    kv_type: Annotated[str, typer.Option(metavar="|".join(KV_TYPES), help="Element type of the KV cache.")] = "f16"
    no_tagger: Annotated[
        bool,
        typer.Option("--no-tagger", help="Do not load the bundle's tagger; the prompt has the tags of --tags or none."),
    ] = False
    memory_budget: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory of the process, as 6G or 512M; parts may then be loaded for each use, which is slower.",
        ),
    ] = None

    def open(self, bundle: Path) -> Model:
        """Load a bundle so."""
        from mllm_edge.runtime import load
        from mllm_edge.runtime.memory import parse_size

        apart = ("no_verify_hash", "no_tagger", "memory_budget")
        options = {name: value for name, value in vars(self).items() if name not in apart}
        if self.memory_budget is not None:
            options["memory_budget"] = parse_size(self.memory_budget)
        return load(bundle, **options, verify_hash=not self.no_verify_hash, tagger=not self.no_tagger)


@dataclass(frozen=True)
class Decoding:
    """Options of commands that decode; what is not given is the bundle's default."""

    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None
    top_k: Annotated[int | None, typer.Option(help="Keep this many of the likeliest tokens; 0 is off.")] = None
    repeat_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End the answer here, not at the template's strings.")
    ] = None
    beams: Annotated[int | None, typer.Option(help="Sequences of a beam search; 1 samples.")] = None
    min_tokens: Annotated[
        int | None, typer.Option(help="No end of the answer, and no picture in it, before so many tokens.")
    ] = None
    group_scale: Annotated[
        float | None,
        typer.Option("--picture-scale", metavar="SCALE", help="Above 1 makes pictures in the answer likelier."),
    ] = None


@dataclass(frozen=True)
class Drawing:
    """Options of commands whose answers may hold pictures; see `mllm_edge.runtime.turn.Drawing`."""

    steps: Annotated[int | None, typer.Option(help="Diffusion steps of a generated picture.")] = None
    guidance: Annotated[
        list[float] | None, typer.Option(metavar="SCALE", help="Guidance scale of a condition; may be repeated.")
    ] = None
    schedule: Annotated[
        str, typer.Option(metavar="NAME", help="Diffusion schedule of a generated picture; by default the bundle's.")
    ] = ""
    draw_seed: Annotated[int, typer.Option(help="The same one gives the same generated picture.")] = 0
    draw: Annotated[
        int,
        typer.Option(metavar="N", help="Generate so many pictures for each that is wanted; the likest comes first."),
    ] = 1
    preview_every: Annotated[
        int | None,
        typer.Option(metavar="STEPS", help="Write preview.png under --out after so many steps of a generated picture."),
    ] = None
    index: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Index of pictures that an answer may retrieve.")
    ] = None

    def open(self, bundle: Path, out: Path | None = None) -> runtime_turn.Drawing:
        """The runtime's own, with previews in the folder `out`.

        Raises:
            BadInput: previews have no folder, the index is not of this bundle, or it cannot draw so; it is not loaded
                then.
        """
        from mllm_edge.bundle.read import read_manifest
        from mllm_edge.runtime.answers.index import Index
        from mllm_edge.runtime.answers.page import is_page
        from mllm_edge.runtime.asked import check_drawing
        from mllm_edge.runtime.turn import Drawing as Made

        if self.preview_every is not None and out is None:
            raise BadInput("--preview-every has no place to write to; give --out too")
        if self.preview_every is not None and out and is_page(out):
            raise BadInput(f"--preview-every writes into a folder, and {out} is a page; give a folder as --out")
        index = Index(self.index) if self.index else None
        if index:
            index.check(read_manifest(bundle, verify_hash=False))
        made = Made(self.steps, self.guidance, self.draw_seed, index, self.schedule, self.draw)
        made = self.previewed(made, out)
        if dataclasses.replace(made, index=None) != Made():
            check_drawing(made, read_manifest(bundle, verify_hash=False))
        return made

    def previewed(self, made: runtime_turn.Drawing, out: Path | None) -> runtime_turn.Drawing:
        """`made` with its previews, if any are wanted, in the folder `out`."""
        from mllm_edge.runtime.answers.write import preview

        if out is None or self.preview_every is None:
            return made
        return dataclasses.replace(made, preview=functools.partial(preview, folder=out), every=self.preview_every)


GROUPS = (Embedding, Loading, Decoding, Drawing)
Command = Callable[..., None]


@dataclass(frozen=True)
class Verb:
    """A command of the app: its name, its examples as help shows them, and what typer calls."""

    name: str
    epilog: str
    command: Command


VERBS: dict[str, list[Verb]] = defaultdict(list)  # by the module that defines them


def verb(*examples: str) -> Callable[[Command], Command]:
    """A decorator that makes a function a command.

    The function gets the screen first. A parameter that is one of the dataclasses above becomes its fields' options.

    Args:
        *examples: command lines without the program's name, shown in the command's help.
    """

    def decorate(function: Command) -> Command:
        _, *parameters = inspect.signature(function, eval_str=True).parameters.values()
        groups: dict[str, type[Any]] = {p.name: p.annotation for p in parameters if p.annotation in GROUPS}

        def command(ctx: typer.Context, **given: Any) -> None:
            for field in dataclasses.fields(Common):
                del given[field.name]
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
            with ctx.obj.working():
                function(ctx.obj, **given)

        options = [_option(p.name, p.annotation, p.default) for p in parameters if p.name not in groups]
        options += [option for group in (*groups.values(), Common) for option in _options(group)]
        command.__doc__ = function.__doc__
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [_option("ctx", typer.Context, inspect.Parameter.empty), *options]
        )
        command.__annotations__ = {}
        epilog = "\n  ".join(["\b\nExamples:", *(f"mllm-edge {example}" for example in examples)])
        VERBS[function.__module__].append(Verb(function.__name__.strip("_"), epilog, command))
        return function

    return decorate


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Turn a library that is not installed into the line that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("mllm_edge"):
            raise
        raise MissingPackage(error.name or "a package", extra) from None


def _option(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _options(group: type[Any]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(group, include_extras=True)
    return [_option(field.name, hints[field.name], field.default) for field in dataclasses.fields(group)]
