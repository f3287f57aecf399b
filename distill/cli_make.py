"""The commands that make what others read: encoded prompts, exports, pairs, preferences, references."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewstep import api, make, measure
from fewstep.distill.data import read_idx
from fewstep.distill.terminal import Device, Source, counting, out, parse_size, progress_bar
from fewstep.errors import UserError
from fewstep.eval.references import build_reference
from fewstep.models.hub.export import Form

app = typer.Typer()


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
    wanted = [size[:2] for text in sizes.split(",") if (size := parse_size(text))] if sizes else []
    with counting("encoding") as progress:
        n = make.encode(
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


@app.command()
def pairs(
    source: Source,
    file: Annotated[Path, typer.Option("--out", help="A safetensors file, for data.path with data.kind=tensors.")],
    n: Annotated[int, typer.Option("--n", help="How many pairs.")] = 10_000,
    solver: Annotated[str, typer.Option(help="One that fewstep sweep lists.")] = "heun",
    steps: int = 18,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Sample a teacher and keep the noise beside the samples: what a regression term learns from."""
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=n)
        make.make_pairs(
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
    solver: Annotated[str | None, typer.Option(help="As of sample; a student's own by default.")] = None,
    steps: int | None = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Sample a model several times a label, keep the best and the worst by a reward, as preference pairs."""
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=n * candidates)
        make.make_preferences(
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
    solver: Annotated[str | None, typer.Option(help="As of sample; a student's own by default.")] = None,
    steps: int | None = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 1,
    file: Annotated[Path | None, typer.Option("--json", help="Where to write the result.")] = None,
    device: Device = "auto",
) -> None:
    """How often a model's samples get more of each reward than another model's, on the same labels and noise."""
    results = measure.win_rates(
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
    with progress_bar() as bar:
        task = bar.add_task("training the classifier", total=None)
        result = build_reference(
            folder, folder.name, train_images, test_images, epochs=epochs, seed=seed,
            progress=lambda step, steps, loss: bar.update(task, completed=step, total=steps),
        )  # fmt: skip
    out.print("  ".join(f"{name} {value:.4f}" for name, value in result.items()))
