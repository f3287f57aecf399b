"""What the commands share: the console, options, progress bars, and lists of numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep.errors import UserError
from fewstep.eval.scores import Score
from fewstep.eval.tables import rows
from fewstep.models.store import Size

out = Console(width=None if Console().is_terminal else 160)
err = Console(stderr=True)

Number = TypeVar("Number", int, float)


ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the path of one that ships with fewstep.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example seed=1 or stages.0.steps=500.")
]
Source = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder, a model folder or an embedded model's name.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Resume = Annotated[Path | None, typer.Option(help="Continue the run in this folder; its own config counts.")]
Grid = Annotated[str, typer.Option(help="Spacing of a teacher's steps: time, quadratic, log_snr, karras, beta.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


@contextmanager
def progress_bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        yield bar


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, and the function that moves it: (how many are done, of how many)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def sampling_bar(n: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over ``n`` samples, and the function that moves it: (what is sampled, how many are done)."""
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=n)
        yield lambda label, done: bar.update(task, description=label, completed=done)


def parse_size(text: str | None) -> Size | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--size is HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, for example 512x512, got {text!r}.")
    height, width, frames = (*map(int, parts), 1)[:3]
    return height, width, frames


def parse_seeds(text: str | None, seed: int) -> list[int]:
    """``0-3`` or ``0,5,7``; without a text, the one seed."""
    first, dash, last = (text or "").partition("-")
    if dash and first.isdigit() and last.isdigit():
        return list(range(int(first), int(last) + 1))
    return parse_numbers(text, int, "--seeds") if text else [seed]


def parse_numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def print_scores(scores: list[Score]) -> None:
    head, *body = rows(scores)
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    out.print(table)
    for note in dict.fromkeys(note for score in scores for note in (score.manifest or {}).get("notes", [])):
        out.print(note, style="yellow", markup=False, highlight=False)
