"""The console script ``fewstep``: arguments in, messages out; the work is done by ``fewstep.api``."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fewstep import api
from fewstep.distill.bench import bench_memory, bench_step
from fewstep.distill.config import load_config
from fewstep.distill.data import read_idx
from fewstep.distill.devices import pick_device
from fewstep.distill.health import diagnose
from fewstep.distill.run import Interrupted, Run, replay_step, run_config
from fewstep.distill.show import show
from fewstep.errors import UserError
from fewstep.eval.evaluate import Score, read_scores
from fewstep.eval.pictures import save_grid
from fewstep.eval.references import build_reference
from fewstep.eval.tables import best_teacher, rows
from fewstep.models.hub.encoded import read_prompts
from fewstep.models.hub.export import Form
from fewstep.models.store import Size, write_text

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil a many-step diffusion or flow model into a few-step generator.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure what the loop costs beside the networks.")
app.add_typer(bench, name="bench")
out = Console(width=None if Console().is_terminal else 160)
err = Console(stderr=True)

Number = TypeVar("Number", int, float)


class Video(StrEnum):
    """The format of videos; MP4 needs the extra ``video``."""

    gif = "gif"
    mp4 = "mp4"


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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


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
    with _bar() as bar:
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
    solver: Annotated[str | None, typer.Option(help="student, euler, heun or ddim.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 0,
    video: Annotated[Video, typer.Option(help="What a video model writes.")] = Video.gif,
    file: Annotated[Path, typer.Option("--out", help="A PNG file; for prompts, a folder.")] = Path("grid.png"),
    device: Device = "auto",
) -> None:
    """Generate images: of labels as one picture, of prompts as a file each (what is there already is kept)."""
    numbers = _numbers(labels, int, "--labels") if labels is not None else None
    model = api.load(source, device, _size(size))
    if prompt is not None or prompts is not None:
        if file.suffix:
            raise UserError(f"--out is a folder for prompts, a file each; {file} looks like a file.")
        lines = [prompt] if prompt is not None else read_prompts(prompts or Path())
        with _counting("sampling") as progress:
            written = api.sample_files(
                model, lines, file, seeds=_seeds(seeds, seed), batch=batch, steps=steps, solver=solver,
                guidance=guidance, video=video.value, progress=progress,
            )  # fmt: skip
        out.print(f"{len(written)} samples are in {file}.")
        return
    images = api.sample(model, n=n, labels=numbers, steps=steps, solver=solver, guidance=guidance, seed=seed)
    columns = len(numbers) if numbers and len(numbers) > 1 else min(n, model.config.classes or 10)
    save_grid(images, file, columns=columns)
    out.print(f"{n} images are in {file}.")


@app.command()
def encode(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="A text file, a prompt a line; or pictures with .txt.")
    ],
    teacher: Annotated[str, typer.Option(help="A diffusers pipeline, by folder or hub id.")],
    folder: Annotated[Path, typer.Option("--out", help="A folder, for data.path with data.kind=prompts.")],
    sizes: Annotated[str | None, typer.Option(help="Of pictures: HEIGHTxWIDTH,..., each at the nearest.")] = None,
    frames: Annotated[int, typer.Option(help="Of videos (.mp4, .gif): how many frames.")] = 1,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 16,
    rows: Annotated[int, typer.Option(help="Prompts a file.")] = 512,
    device: Device = "auto",
) -> None:
    """Encode prompts (and pictures) once, so that training needs no encoder. An interrupted run goes on."""
    wanted = [size[:2] for text in sizes.split(",") if (size := _size(text))] if sizes else []
    with _counting("encoding") as progress:
        n = api.encode(
            teacher, prompts, folder, sizes=wanted, frames=frames, batch=batch, rows=rows, device=device,
            progress=progress,
        )  # fmt: skip
    out.print(f"{n} are encoded in {folder}.")


@app.command()
def export(
    run: Source,
    folder: Annotated[Path, typer.Option("--out", help="A new folder.")],
    form: Annotated[Form, typer.Option("--to", help="diffusers, merged, lora or comfyui.")] = Form.diffusers,
    device: Device = "cpu",
) -> None:
    """Write a student as a diffusers pipeline, a bare network or a LoRA file, and check it against the student."""
    out.print(f"The student is in {api.export(run, form, folder, device)}: reloaded, and the same.")


@app.command("eval")
def evaluate(
    source: Source,
    reference: Annotated[str, typer.Option(help="An embedded reference or a reference folder.")] = "fashion",
    steps: Annotated[str | None, typer.Option(help="One or several; 1,2,4 by default.")] = None,
    nfe: Annotated[str | None, typer.Option(help="Instead of --steps: as many as fit in these evaluations.")] = None,
    solver: Annotated[str | None, typer.Option(help="One or several of student, euler, heun, ddim.")] = None,
    guidance: Annotated[str, typer.Option(help="One or several scales, for example 1,2.")] = "1",
    n: Annotated[int, typer.Option("--n", help="Samples a combination.")] = 10_000,
    seed: int = 0,
    file: Annotated[
        Path | None, typer.Option("--json", help="A file to merge the scores into (for a run: its eval.json).")
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a model on real images: Fréchet distance, KID, precision, recall, accuracy, diversity."""
    if steps and nfe:
        raise UserError("Give --steps or --nfe, not both.")
    counts = _numbers(steps or "1,2,4", int, "--steps")
    budgets = _numbers(nfe, int, "--nfe") if nfe else []
    scales = _numbers(guidance, float, "--guidance")
    rules = solver.split(",") if solver else []
    with _sampling_bar(n) as progress:
        scores = api.evaluate(
            source, reference=reference, steps=counts, nfe=budgets, solver=rules, guidance=scales, n=n, seed=seed,
            device=device, json_file=file, progress=progress,
        )  # fmt: skip
    _print_scores(scores)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html into a run folder."""
    out.print(f"The report is {api.report(run)}.")


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
def demo(folder: Annotated[Path, typer.Option("--out", help="The run folder.")] = Path("runs/demo")) -> None:
    """Distil the embedded teacher, score the student and write a report: a few minutes on a laptop."""
    names = (folder if k == 1 else folder.with_name(f"{folder.name}-{k}") for k in count(1))
    folder = next(name for name in names if not (name / "report.html").exists())
    if (folder / "config.yaml").is_file():
        out.print(f"{folder} holds an unfinished demo: continuing it.")
        _train(None, [], folder)
    else:
        _train("configs/fashion/demo.yaml", [f"out={folder}"], None)
    with _sampling_bar(10_000) as progress:
        api.evaluate(folder, progress=progress)
    picture = api.compare(folder)
    out.print("Teacher (its best setting within each number of evaluations) and student:")
    _print_scores(best_teacher(read_scores(folder / "eval.json")))
    out.print(f"Teacher and student side by side: {picture}\nThe report: {api.report(folder)}")


@app.command()
def pairs(
    source: Source,
    file: Annotated[Path, typer.Option("--out", help="A safetensors file, for data.path with data.kind=tensors.")],
    n: Annotated[int, typer.Option("--n", help="How many pairs.")] = 10_000,
    solver: Annotated[str, typer.Option(help="euler, heun or ddim.")] = "heun",
    steps: int = 18,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Sample a teacher and keep the noise beside the samples: what a regression term learns from."""
    with _bar() as bar:
        task = bar.add_task("sampling", total=n)
        api.make_pairs(
            source, file, n=n, solver=solver, steps=steps, guidance=guidance, seed=seed, device=device,
            progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    out.print(f"{n} pairs are in {file}.")


@app.command()
def prefer(
    source: Source,
    file: Annotated[Path, typer.Option("--out", help="A safetensors file, for data.path with data.kind=tensors.")],
    reward: Annotated[str, typer.Option(help="confidence, symmetry or brightness.")],
    n: Annotated[int, typer.Option("--n", help="How many pairs.")] = 2_000,
    reference: Annotated[str, typer.Option(help="A reference by name or folder, for its classifier.")] = "fashion",
    candidates: Annotated[int, typer.Option(help="Samples for each pair, of which the best and the worst count.")] = 4,
    solver: Annotated[
        str | None, typer.Option(help="student, euler, heun or ddim; a student's own by default.")
    ] = None,
    steps: int | None = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Sample a model several times a label, keep the best and the worst by a reward, as preference pairs."""
    with _bar() as bar:
        task = bar.add_task("sampling", total=n * candidates)
        api.make_preferences(
            source, file, reward=reward, n=n, candidates=candidates, solver=solver, steps=steps, guidance=guidance,
            reference=reference, seed=seed, device=device, progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    out.print(f"{n} pairs are in {file}.")


@app.command()
def wins(
    ours: Source,
    theirs: Annotated[str, typer.Argument(metavar="OTHER", help="What it is compared with.")],
    n: Annotated[int, typer.Option("--n", help="Samples of each.")] = 2_000,
    reference: Annotated[str, typer.Option(help="A reference by name or folder, for its classifier.")] = "fashion",
    solver: Annotated[
        str | None, typer.Option(help="student, euler, heun or ddim; a student's own by default.")
    ] = None,
    steps: int | None = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 1,
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
    device: Device = "auto",
) -> None:
    """How often a model's samples get more of each reward than another model's, on the same labels and noise."""
    results = api.win_rates(
        ours, theirs, n=n, solver=solver, steps=steps, guidance=guidance, reference=reference, seed=seed, device=device,
        json_file=file,
    )  # fmt: skip
    table = Table("reward", "win rate", "95 % interval", "mean", "mean of the other")
    for r in results:
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        table.add_row(r["reward"], f"{r['win_rate']:.3f}", interval, f"{r['ours']:.3f}", f"{r['theirs']:.3f}")
    out.print(table)


@app.command()
def reference(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder with the four idx files.")],
    folder: Annotated[Path, typer.Option("--out", help="A new folder for the reference.")],
    epochs: Annotated[int, typer.Option(help="Passes of the classifier over the training images.")] = 6,
    seed: int = 0,
) -> None:
    """Train the evaluator's classifier and write a reference: features of real images, and some of the images."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder with --out.")
    train_images, test_images = read_idx(data, "train"), read_idx(data, "test")
    with _bar() as bar:
        task = bar.add_task("training the classifier", total=None)
        result = build_reference(
            folder, folder.name, train_images, test_images, epochs=epochs, seed=seed,
            progress=lambda step, steps, loss: bar.update(task, completed=step, total=steps),
        )  # fmt: skip
    out.print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))


@app.command()
def shootout(config: ConfigFile, device: Device = "auto") -> None:
    """Train several methods from one teacher at one budget of evaluations, several seeds each, and compare them."""
    with _bar() as bar:

        def progress(name: str) -> Callable[[Run, dict[str, float]], None]:
            task = bar.add_task(name)
            return lambda run, metrics: bar.update(task, completed=run.step, total=run.config.steps)

        scores = api.shootout(config, progress, device)
    _print_scores(scores)


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
    result = bench_step(load_config(config, overrides or []), rounds)
    for name, value in result.items():
        out.print(f"{name}: {value}")
    if file is not None:
        write_text(json.dumps(result, indent=1) + "\n", file)


@bench.command("memory")
def memory(
    config: ConfigFile,
    overrides: Overrides = None,
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
) -> None:
    """Bytes of weights and the peak of training, with adapters (where the config has them) and with copies."""
    result = bench_memory(load_config(config, overrides or []))
    for name, value in result.items():
        out.print(f"{name}: {value}")
    if file is not None:
        write_text(json.dumps(result, indent=1) + "\n", file)


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True) as bar:
        yield bar


@contextmanager
def _counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar, and the function that moves it: (how many are done, of how many)."""
    with _bar() as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _sampling_bar(n: int) -> Iterator[Callable[[str, int], None]]:
    """A bar over ``n`` samples, and the function that moves it: (what is sampled, how many are done)."""
    with _bar() as bar:
        task = bar.add_task("sampling", total=n)
        yield lambda label, done: bar.update(task, description=label, completed=done)


def _size(text: str | None) -> Size | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--size is HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, for example 512x512, got {text!r}.")
    height, width, frames = (*map(int, parts), 1)[:3]
    return height, width, frames


def _seeds(text: str | None, seed: int) -> list[int]:
    """``0-3`` or ``0,5,7``; without a text, the one seed."""
    first, dash, last = (text or "").partition("-")
    if dash and first.isdigit() and last.isdigit():
        return list(range(int(first), int(last) + 1))
    return _numbers(text, int, "--seeds") if text else [seed]


def _numbers(text: str, kind: Callable[[str], Number], option: str) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} takes numbers separated by commas, got {text!r}.") from error


def _print_scores(scores: list[Score]) -> None:
    head, *body = rows(scores)
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    out.print(table)
