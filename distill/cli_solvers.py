"""The commands about a teacher's training-free solvers: what they need to know of a model, and how they compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewstep import make, measure
from fewstep.distill.terminal import Device, Source, counting, out, parse_numbers
from fewstep.errors import UserError
from fewstep.eval.sweep import at_their_best, cells
from fewstep.samplers.solvers import described

app = typer.Typer()
OutFile = Annotated[Path, typer.Option("--out", help="A file; beside the model's own, the solvers find it.")]


@app.command()
def ems(
    source: Source,
    file: OutFile,
    n: Annotated[int, typer.Option("--n", help="Samples of the model that the expectations are over.")] = 1024,
    intervals: Annotated[int, typer.Option(help="Intervals in log-SNR.")] = 120,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Measure the statistics of a model that DPM-Solver-v3 needs. An interrupted run goes on."""
    with counting("measuring") as progress:
        make.make_statistics(
            source, file, n=n, intervals=intervals, guidance=guidance, seed=seed, device=device, progress=progress
        )
    out.print(f"The statistics are in {file}.")


@app.command()
def ratios(
    source: Source,
    file: OutFile,
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "5,6,8,10",
    guidance: Annotated[str, typer.Option(help="Guidance scales.")] = "2",
    order: Annotated[int, typer.Option(help="Of the UniPC that is compensated.")] = 2,
    n: Annotated[int, typer.Option("--n", help="Samples that the search looks at.")] = 32,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Search the ratios of DC-Solver for a model."""
    with counting("searching") as progress:
        make.search_ratios(
            source, file, steps=parse_numbers(steps, int, "--steps"), order=order,
            guidance=parse_numbers(guidance, float, "--guidance"), n=n, seed=seed, device=device, progress=progress,
        )  # fmt: skip
    out.print(f"The ratios are in {file}.")


@app.command()
def sweep(
    source: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Without one: lists the solvers.")] = None,
    solvers: Annotated[str | None, typer.Option(help="Names, separated by commas. Without: lists them.")] = None,
    nfe: Annotated[str, typer.Option(help="Network evaluations a sample.")] = "4,5,6,8,10,15,20,32",
    grids: Annotated[str, typer.Option(help="Spacings to try; each solver is shown at its best.")] = "time",
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 is off.")] = 1.0,
    n: Annotated[int, typer.Option("--n", help="Samples.")] = 2_000,
    long: Annotated[int, typer.Option(help="Steps of the run that errors are measured against.")] = 1000,
    reference: Annotated[str | None, typer.Option(help="Also score on this reference.")] = None,
    folder: Annotated[Path, typer.Option("--out", help="For sweep.json, sweep.md and sweep.png.")] = Path("runs/sweep"),
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Compare a teacher's solvers: the error to a long run from the same noise, and quality, by evaluations."""
    if source is None or solvers is None:
        table = Table("solver", "order", "evaluations a step", "paper")
        for row in described():
            table.add_row(*row)
        out.print(table)
        return
    if guidance != 1 and any(count < 2 for count in parse_numbers(nfe, int, "--nfe")):
        raise UserError("A guided step costs two evaluations.")
    with counting("sampling") as progress:
        lines = measure.sweep(
            source, solvers=solvers.split(","), nfe=parse_numbers(nfe, int, "--nfe"), grids=grids.split(","),
            guidance=guidance, n=n, long=long, reference=reference, folder=folder, seed=seed, device=device,
            progress=progress,
        )  # fmt: skip
    head, *body = cells(at_their_best(lines))
    table = Table(*head)
    for line in body:
        table.add_row(*line)
    out.print(table)
    out.print(f"All grids, the table and the figure are in {folder}.")
