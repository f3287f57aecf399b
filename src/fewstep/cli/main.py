"""The console script ``fewstep``: arguments in, messages out; the work is done by ``fewstep.api``.

Commands import what they need when they run, so that ``fewstep --help`` is fast.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewstep.cli import app as app_command
from fewstep.cli import bench, data, demo, doctor, evaluate, models, solver, train
from fewstep.cli.options import FIRST, SPEAKING_SECONDS, err, leave, print_text
from fewstep.core.errors import UserError
from fewstep.core.host_memory import keep_freed_memory

RENAMED = {
    "pretrain": "train", "show": "explain", "encode": "data encode", "reference": "data reference",
    "pairs": "data ode-pairs", "prefer": "data preferences", "wins": "winrate", "shootout": "bench objectives",
    "sweep": "solver compare (and solver list)", "ems": "solver fit-v3", "ratios": "solver fit-dc",
}  # old command: what it is called now  # fmt: skip


class Commands(TyperGroup):
    """Typer ends Ctrl-C without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_text("\nInterrupted.", "yellow", err)
            leave(130)


app = typer.Typer(
    cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Distil a many-step diffusion or flow model into a few-step generator.",
    epilog="Example: fewstep train configs/fashion/demo.yaml out=runs/first",
)  # fmt: skip
for group in (train, models, evaluate, demo, app_command, doctor):
    app.add_typer(group.app)
app.add_typer(data.app, name="data")
app.add_typer(solver.app, name="solver")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fewstep {version('fewstep')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import a module of your own first, with its networks, metrics, …"
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    keep_freed_memory()
    sys.path.append(os.getcwd())  # where modules of one's own are looked for last
    for module in modules or []:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"--import {module}: {error}.") from error


def main() -> None:
    """Runs a command. A mistake ends as one paragraph with exit code 1, Ctrl-C with exit code 130."""
    debug = "--debug" in sys.argv
    arguments = [_without_tilde(argument) for argument in sys.argv[1:] if argument != "--debug"]
    try:
        _refuse_renamed(arguments)
        app(arguments, standalone_mode=True)
    except KeyboardInterrupt:
        print_text("\nInterrupted.", "yellow", err)
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, UserError)
        text = str(error) if known else f"{type(error).__name__}: {error} (unexpected; --debug shows the traceback)"
        _show(error, text)
        leave(1)


def _show(error: Exception, text: str) -> None:
    """Shows an error. Of several processes, the first one shows what all share, and another one its own."""
    if FIRST:
        print_text(f"Error: {text}", "red", err)
        return
    from fewstep.distill.processes import SharedError, have_met

    if isinstance(error, SharedError):
        return
    if not have_met():  # where all fail alike, the first one has spoken by then, and the launcher ended this one
        time.sleep(SPEAKING_SECONDS)
    sys.stderr.write(f"Error in process {os.environ['RANK']}: {text}\n")


def _without_tilde(argument: str) -> str:
    """Replaces ``~/`` after an equals sign by the home folder, as shells do elsewhere: ``--out=~/grid.png``."""
    name, equals, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if equals and value.startswith("~/") else argument


def _refuse_renamed(arguments: list[str]) -> None:
    after_import = {index + 1 for index, argument in enumerate(arguments) if argument == "--import"}
    words = (word for index, word in enumerate(arguments) if index not in after_import and not word.startswith("-"))
    command = next(words, "")
    if command in RENAMED:
        raise UserError(f"The command {command!r} is now: fewstep {RENAMED[command]}.")
    if command == "eval" and "--compare" in arguments:
        raise UserError("eval --compare is now: fewstep compare A.json B.json.")
