"""What the commands share: console, options, progress bars, and parsing of lists. Nothing here imports torch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from fewstep.core.errors import UserError
from fewstep.core.limits import MOST_SAMPLES, check_count

if TYPE_CHECKING:
    from fewstep.eval.score_files import Score
    from fewstep.samplers.plan import SamplingConfig

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes (torchrun), only the first one speaks
SPEAKING_SECONDS = 10
FIRST_LINE, LINES = 5.0, 30.0  # seconds to the first line of a task off a terminal, and between later ones
out = Console(width=None if Console().is_terminal else 200, markup=False, emoji=False, quiet=not FIRST)
err = Console(stderr=True, markup=False, emoji=False, quiet=not FIRST)

Number = TypeVar("Number", int, float)

ConfigFile = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or the path of one that ships with fewstep.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes a setting: seed=1, stages.0.steps=500.")
]


class CommandWithSettings(TyperCommand):
    """A command that takes settings as KEY=VALUE: what looks like an option may be meant as one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
        for name in (argument.partition("=")[0] for argument in args):
            if name[:2] == "--" != name and name not in known and not get_close_matches(name, known, cutoff=0.8):
                raise UserError(
                    f"{name} is no option of fewstep {self.name}. Settings are given without dashes, as in seed=1 or "
                    "stages.0.steps=200."
                )
        return super().parse_args(ctx, args)


def note_checkpoint(source: str | None) -> str | None:
    """Says which checkpoint stands for a run that is not finished, and returns it: a newer one may be written."""
    if source is not None and (Path(source) / "config.yaml").is_file():
        from fewstep.api.models import checkpoint_of

        if (checkpoint := checkpoint_of(source)) is not None:
            print_text(f"{source} is not finished: this is the student of its {checkpoint.name}.", "yellow", err)
            return str(checkpoint)
    return source


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", callback=note_checkpoint,
        help="A run, a checkpoint, a model folder, a diffusers pipeline (folder or hub id), or a bundled model: emoji, "
        "emoji-video, fashion, fashion-text.",
    ),
]  # fmt: skip
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output.")
]
Solver = Annotated[
    str | None, typer.Option(help="student, or one of fewstep solver list. Default: student for a student, else euler.")
]
Steps = Annotated[int | None, typer.Option(help="Number of steps. Default: a student's own; 32 for a teacher.")]
GuidanceScale = Annotated[float, typer.Option("--guidance", help="Guidance scale; 1 is off.")]
GRID_HELP = (
    "A teacher's times: a spacing (time, log_snr, karras, beta, …; docs/samplers.md lists all) or the times "
    "themselves, times:1,0.9,0.75,0.5."
)
Grid = Annotated[str, typer.Option(help=GRID_HELP)]
Captions = Annotated[
    Path | None,
    typer.Option(help="For a model that takes prompts: a text file, one caption per line, or a table. Used in turn."),
]
Size = Annotated[str | None, typer.Option(help="For pipelines: HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES in pixels.")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="Samples at a time. Default: 8 of a pipeline, 100 of another model.")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]


def leave(code: int) -> NoReturn:
    """Ends this process with a code. A launcher of several processes ends all of them with the first one that fails, so
    the others give the first one, which speaks, the time to do so."""
    if not FIRST:
        time.sleep(SPEAKING_SECONDS)
    sys.exit(code)


def sampling_of(solver: str | None, steps: int | None, guidance: float, grid: str, seed: int) -> SamplingConfig:
    """The sampling options of a command."""
    from fewstep.samplers.plan import SamplingConfig

    return SamplingConfig(solver, steps, guidance, grid, seed)


class TaskProgress(Progress):
    """A bar for each task. Where standard error is no terminal, as in a batch job, a line about a task that was moved
    after ``FIRST_LINE`` seconds, and then every ``LINES`` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeRemainingColumn(), console=err, transient=True)
        self._clock, self._next_line = clock, clock() + FIRST_LINE

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        if not self.console.is_terminal and self._clock() >= self._next_line:
            self._next_line = self._clock() + LINES
            task = next(each for each in self.tasks if each.id == task_id)
            of = "" if task.total is None else f"/{task.total:.0f}"
            print_text(f"{task.description} {task.completed:.0f}{of}", None, err)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    with TaskProgress() as bar:
        yield bar


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, and the function that moves it: (number done, number in all)."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def sampling_bar(n: int) -> Iterator[Callable[[str, int], None]]:
    """A progress bar over ``n`` samples, and the function that moves it: (what is sampled, number done)."""
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=n)
        yield lambda label, done: bar.update(task, description=label, completed=done)


def parse_size(text: str | None) -> tuple[int, int, int] | None:
    """Height, width and frames in pixels from ``512x512`` or ``480x832x81``."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UserError(f"--size is HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, for example 512x512, got {text!r}.")
    height, width, frames = (*map(int, parts), 1)[:3]
    return height, width, frames


def parse_seeds(text: str | None, seed: int) -> list[int]:
    """``0-3`` or ``0,5,7``; the one ``seed`` without a text. Raises ``UserError`` on a range that ends before it
    starts, or that has more than ``MOST_SAMPLES``."""
    if text is None:
        return [seed]
    first, dash, last = text.partition("-")
    if dash and first.isdecimal() and last.isdecimal():
        low, high = parse_numbers(f"{first},{last}", int, "--seeds")
        if high < low:
            raise UserError(f"--seeds {text} contains no seed: give the smaller number first.")
        check_count("The number of --seeds", high - low + 1, MOST_SAMPLES)
        return list(range(low, high + 1))
    return parse_numbers(text, int, "--seeds")


def parse_numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    """Numbers separated by commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def parse_names(text: str | None, option: str) -> list[str]:
    """Names separated by commas; none without a text. Raises ``UserError`` on an empty one."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"{option} takes names separated by commas, got {text!r}.")
    return names


def refuse(reason: str, **options: object) -> None:
    """Raises ``UserError`` that names the ``options`` which were given (are not None) although they have no effect."""
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]:
        raise UserError(f"{reason}: remove {', '.join(given)}.")


def counted(n: int, noun: str) -> str:
    """``1 image is``, ``20 images are``."""
    return f"1 {noun} is" if n == 1 else f"{n} {noun}s are"


def print_text(text: str, style: str | None = None, console: Console = out) -> None:
    """Prints a text as it is: brackets and colons in paths stay, and no line is broken, so that it can be copied."""
    printable = text.encode(errors="backslashreplace").decode()  # a file's name need not be UTF-8
    console.print(printable, style=style, highlight=False, soft_wrap=True)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A table whose first row is the header."""
    head, *body = rows
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    out.print(table)


def print_scores(scores: list[Score]) -> None:
    from fewstep.eval.report.tables import rows

    print_table(rows(scores))
    for note in dict.fromkeys(note for score in scores for note in score.notes()):
        print_text(note, "yellow")


def check_json(file: Path | None, *inputs: Path) -> None:
    """Before long work: raises ``UserError`` if its result could not be written to ``file``, or would overwrite one of
    the ``inputs``."""
    if file is not None and str(file) != "-":
        from fewstep.core.files import check_writable

        check_writable(file, *inputs)


def write_json(result: Any, file: Path) -> None:
    """To a file, or to standard output if it is ``-``."""
    text = json.dumps(result, indent=1) + "\n"
    if str(file) == "-":
        typer.echo(text, nl=False)
        return
    from fewstep.core.files import write_text

    write_text(text, file)
