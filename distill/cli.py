"""The console script ``fewstep``: arguments in, messages out; the work is done by ``api``, ``make`` and ``measure``."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fewstep import api, make, measure
from fewstep.distill import cli_eval, cli_make, cli_solvers
from fewstep.distill.bench import bench_memory, bench_sampler, bench_step
from fewstep.distill.config import find_config, load_config
from fewstep.distill.devices import pick_device
from fewstep.distill.health import diagnose
from fewstep.distill.run import Interrupted, Run, replay_step, run_config
from fewstep.distill.show import show
from fewstep.distill.terminal import (
    ConfigFile,
    Device,
    Grid,
    Overrides,
    Resume,
    RunFolder,
    Source,
    counting,
    err,
    out,
    parse_numbers,
    parse_seeds,
    parse_size,
    print_scores,
    progress_bar,
    sampling_bar,
)  # fmt: skip
from fewstep.errors import UserError
from fewstep.eval.pictures import save_grid
from fewstep.eval.scores import read_scores
from fewstep.eval.tables import best_teacher
from fewstep.models.hub.encoded import read_prompts
from fewstep.models.store import reserve, write_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a many-step diffusion or flow model into a few-step generator.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure what the loop costs beside the networks.")
app.add_typer(bench, name="bench")
app.add_typer(cli_eval.app)
app.add_typer(cli_make.app)
app.add_typer(cli_solvers.app)


class Video(StrEnum):
    """The format of videos; MP4 needs the extra ``video``."""

    gif = "gif"
    mp4 = "mp4"


def main() -> None:
    """Runs a command. A mistake ends as one paragraph and exit code 1, Ctrl-C as exit code 130."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, standalone_mode=True)
    except Interrupted as stop:
        err.print(f"\nInterrupted: {stop}. Continue with: fewstep train --resume {stop.folder}", style="yellow")
        sys.exit(130)
    except KeyboardInterrupt:
        err.print("\nInterrupted.", style="yellow")
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        known = isinstance(error, UserError)
        text = str(error) if known else f"{type(error).__name__}: {error} (an unforeseen error; --debug shows where)"
        err.print(f"Error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@app.command()
def pretrain(config: ConfigFile, overrides: Overrides = None, resume: Resume = None) -> None:
    """Train a new network on data, to be a teacher (a config with model:)."""
    _train(config, overrides or [], resume)


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="Not needed with --resume.")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
) -> None:
    """Distil a teacher into a few-step student."""
    _train(config, overrides or [], resume)


def _train(config: str | None, overrides: list[str], resume: Path | None) -> Path:
    if resume is None and config is None:
        raise UserError("Name a config, for example configs/fashion/demo.yaml, or a run to --resume.")
    if resume is not None and overrides:
        raise UserError("With --resume the run's own config counts, so it takes no key=value.")
    settings = run_config(resume) if resume is not None else load_config(config or "", overrides)
    logged: list[dict[str, float]] = []
    told: set[str] = set()
    with progress_bar() as bar:
        task = bar.add_task("training", total=settings.steps)

        def progress(run: Run, metrics: dict[str, float]) -> None:
            losses = "  ".join(
                f"{name.removeprefix('loss/')} {value:.4f}" for name, value in metrics.items() if "loss/" in name
            )
            best = f"  best {run.best['value']:.2f}" if run.best else ""
            bar.update(task, completed=run.step, description=losses + best if metrics else None)
            if metrics and not out.is_terminal and run.step % (20 * run.config.log_every) == 0:
                out.print(f"step {run.step}/{settings.steps}  {run.seconds:.0f} s  {losses}{best}")
            if metrics:
                logged.append(metrics)
                for finding in diagnose(logged):
                    if finding.name not in told:
                        told.add(finding.name)
                        out.print(f"step {run.step}: {finding.text}", style="yellow", markup=False, highlight=False)

        out.print(f"On {pick_device(settings.device).type}, attention by {settings.attention}.")
        run = api.train_run(settings, resume, progress)
    out.print(f"Trained {run.step} steps in {run.seconds:.0f} s. The student is in {run.folder / 'student'}.")
    return run.folder


@app.command()
def sample(
    source: Source,
    n: Annotated[int, typer.Option("--n", help="How many images of labels; of prompts see --seeds.")] = 80,
    steps: Annotated[int | None, typer.Option(help="Steps; a student's own number by default.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What to show, for a text-conditioned model.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds for each prompt: 0-3 or 0,5,7. By default --seed.")] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, for a pipeline.")] = None,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    labels: Annotated[str | None, typer.Option(help="Class labels, for example 0,1,2; all in turn by default.")] = None,
    solver: Annotated[str | None, typer.Option(help="student, or one that fewstep sweep lists.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    grid: Grid = "time",
    seed: int = 0,
    video: Annotated[Video, typer.Option(help="What a video model writes.")] = Video.gif,
    file: Annotated[Path, typer.Option("--out", help="A PNG file; for prompts, a folder.")] = Path("grid.png"),
    device: Device = "auto",
) -> None:
    """Generate images: of labels as one picture, of prompts as a file each (what is there already is kept)."""
    numbers = parse_numbers(labels, int, "--labels") if labels is not None else None
    model = api.load(source, device, parse_size(size))
    if prompt is not None or prompts is not None:
        if file.suffix:
            raise UserError(f"--out is a folder for prompts, a file each; {file} looks like a file.")
        lines = [prompt] if prompt is not None else read_prompts(prompts or Path())
        with counting("sampling") as progress:
            written = api.sample_files(
                model, lines, file, seeds=parse_seeds(seeds, seed), batch=batch, steps=steps, solver=solver,
                guidance=guidance, grid=grid, video=video.value, progress=progress,
            )  # fmt: skip
        out.print(f"{len(written)} samples are in {file}.")
        return
    reserve(file)
    images = api.sample(model, n=n, labels=numbers, steps=steps, solver=solver, guidance=guidance, grid=grid, seed=seed)
    columns = len(numbers) if numbers and len(numbers) > 1 else min(n, model.config.classes or 10)
    save_grid(images, file, columns=columns)
    out.print(f"{n} images are in {file}.")


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html into a run folder."""
    out.print(f"The report is {measure.report(run)}.")


@app.command()
def replay(run: RunFolder, step: Annotated[int, typer.Option(help="A logged step.")]) -> None:
    """Compute a logged step again from the checkpoint before it and compare every number."""
    recorded, computed = replay_step(run, step, pick_device(run_config(run).device))
    table = Table("quantity", "recorded", "replayed")
    for name, value in computed.items():
        table.add_row(name, repr(recorded.get(name)), repr(value), style=None if recorded.get(name) == value else "red")
    out.print(table)
    if recorded != computed:
        raise UserError(
            f"Step {step} did not replay bit for bit: other versions, another machine or another number of threads?"
        )
    out.print(f"Step {step} replayed bit for bit.")


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option("--out", help="The run folder: runs/demo or runs/demo_text.")] = None,
    text: Annotated[
        bool, typer.Option("--text", help="The text-conditioned teacher; needs the extra diffusers.")
    ] = False,
) -> None:
    """Distil an embedded teacher, score the student and write a report: a few minutes on a laptop."""
    config, n, overrides = "configs/fashion/demo.yaml", 10_000, []
    folder = folder or Path("runs/demo_text" if text else "runs/demo")
    if text:
        captions = folder.with_name(f"{folder.name}_captions")
        config, n, overrides = "configs/fashion_text/demo.yaml", 1_440, [f"data.path={captions}"]
        with counting("encoding captions") as encoding:
            make.encode("fashion-text", find_config(config).with_name("captions.txt"), captions, progress=encoding)
    names = (folder if k == 1 else folder.with_name(f"{folder.name}-{k}") for k in count(1))
    folder = next(name for name in names if not (name / "report.html").exists())
    if (folder / "config.yaml").is_file():
        out.print(f"{folder} holds an unfinished demo: continuing it.")
        _train(None, [], folder)
    else:
        _train(config, [f"out={folder}", *overrides], None)
    with sampling_bar(n) as progress:
        measure.evaluate(folder, n=n, progress=progress)
    picture = measure.compare(folder)
    out.print("Teacher (its best setting within each number of evaluations) and student:")
    print_scores(best_teacher(read_scores(folder / "eval.json")))
    out.print(f"Teacher and student side by side: {picture}\nThe report: {measure.report(folder)}")


@app.command()
def shootout(config: ConfigFile, overrides: Overrides = None, device: Device = "auto") -> None:
    """Train several methods from one teacher at one budget of evaluations, several seeds each, and compare them."""
    with progress_bar() as bar:

        def progress(name: str) -> Callable[[Run, dict[str, float]], None]:
            task = bar.add_task(name)
            return lambda run, metrics: bar.update(task, completed=run.step, total=run.config.steps)

        scores = measure.shootout(config, *overrides or [], progress=progress, device=device)
    print_scores(scores)


@app.command("show")
def show_config(config: ConfigFile, overrides: Overrides = None) -> None:
    """Explain a config: the method's equations, its updates and what they cost, where it departs from the defaults."""
    for number, view in enumerate(show(load_config(config, overrides or []))):
        out.print(f"stages.{number}: {view.text}\n", markup=False, highlight=False)
        table = Table("update", "trains", "due", "evaluations a sample and update: role without + with gradient")
        for row in view.updates:
            costs = ", ".join(f"{role} {plain:.3g} + {graph:.3g}" for role, (plain, graph) in row.evaluations.items())
            due = "every step" if row.due.every == 1 else f"one step in {row.due.every}"
            table.add_row(row.name, ", ".join(row.roles), due, costs)
        out.print(table)
        out.print(f"Forward passes a sample and step, over all roles: {view.evaluations_a_step:.3g}.")
        settings = Table("setting", "here", "default", "published")
        for row_of_settings in view.settings:
            settings.add_row(*row_of_settings)
        out.print(settings if view.settings else "All settings of the objective are its defaults.")


@bench.command("step")
def step(
    config: ConfigFile,
    overrides: Overrides = None,
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
    rounds: Annotated[int, typer.Option(help="Paired rounds; the medians are reported.")] = 15,
) -> None:
    """Time a full update against the same network evaluations run bare, paired in one process."""
    _result(bench_step(load_config(config, overrides or []), rounds), file)


@bench.command("sampler")
def sampler(
    source: Source,
    solver: Annotated[str, typer.Option(help="One that fewstep sweep lists.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(help="Steps.")] = 10,
    batch: Annotated[int, typer.Option(help="Samples at once.")] = 64,
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
    rounds: Annotated[int, typer.Option(help="Paired rounds; the medians are reported.")] = 15,
    device: Device = "auto",
) -> None:
    """Time a solver's steps against as many bare calls of the network, paired in one process."""
    _result(bench_sampler(api.load(source, device), solver, steps, batch, rounds), file)


@bench.command("memory")
def memory(
    config: ConfigFile,
    overrides: Overrides = None,
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Bytes of weights and the peak of training, with adapters (where the config has them) and with copies."""
    _result(bench_memory(load_config(config, overrides or [])), file)


def _result(result: dict[str, Any], file: Path | None) -> None:
    for name, value in result.items():
        out.print(f"{name}: {value}")
    if file is not None:
        write_text(json.dumps(result, indent=1) + "\n", file)
