"""The app: the verbs of all groups under one name."""

from __future__ import annotations

from typing import Annotated

import typer

from mllm_edge.commands import ask, index, look, make, measure
from mllm_edge.commands.frame import VERBS
from mllm_edge.version import __version__

# What typer raises for a wrong command line. Its home moved between typer's versions, its place above BadParameter not.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _help(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app = typer.Typer(
    name="mllm-edge",
    help="Multimodal LLMs from a recipe or a public checkpoint to the machine they must run on.",
    epilog="Every command takes --json, --quiet and --debug. Exit codes: 0 done, 1 failed or out of tolerance, 2 bad "
    "usage or input.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: drawing boxes with rich would double the time of --help
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _group in (look, make, ask, measure):
    for _verb in VERBS[_group.__name__]:
        app.command(name=_verb.name, epilog=_verb.epilog)(_verb.command)
NESTED = {"index": index}  # verbs that have verbs of their own
for _name, _group in NESTED.items():
    _nested = typer.Typer(name=_name, help=_group.__doc__, rich_markup_mode=None)
    for _verb in VERBS[_group.__name__]:
        _nested.command(name=_verb.name, epilog=_verb.epilog)(_verb.command)
    _nested.callback(invoke_without_command=True)(_help)
    app.add_typer(_nested)


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mllm-edge {__version__}")
    else:
        _help(ctx)


def usage_line(error: Exception) -> str:
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
