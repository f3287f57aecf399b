"""``fewstep solver``: a teacher's training-free solvers, what they need to know of a model, and how they compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import (
    Device,
    GuidanceScale,
    JsonFile,
    ModelName,
    counting,
    parse_names,
    parse_numbers,
    print_table,
    print_text,
    write_json,
)  # fmt: skip
from fewstep.core.errors import UserError
from fewstep.core.limits import MOST_SAMPLES

app = typer.Typer(no_args_is_help=True, help="List, compare and prepare training-free solvers of a teacher.")


@app.command("list", epilog="Example: fewstep solver list")
def list_solvers(file: JsonFile = None) -> None:
    """List the solvers: order, network evaluations per step, paper, names in other libraries."""
    from fewstep.samplers.solvers import describe_solvers

    head = ("solver", "order", "evaluations per step", "paper", "also called")
    if file is not None:
        write_json([dict(zip(head, row, strict=True)) for row in describe_solvers()], file)
    else:
        print_table([head, *describe_solvers()])


@app.command(epilog="Example: fewstep solver compare fashion --solvers ddim,unipc_2 --nfe 5,8 --n 200 --long 100")
def compare(
    model_name: ModelName,
    solvers: Annotated[str, typer.Option(help="Names of fewstep solver list, separated by commas.")],
    nfe: Annotated[str, typer.Option(help="Numbers of network evaluations per sample.")] = "4,5,6,8,10,15,20,32",
    grids: Annotated[str, typer.Option(help="Spacings of times to try; each solver is shown at its best.")] = "time",
    guidance: GuidanceScale = 1.0,
    n: Annotated[int, typer.Option("--n", max=MOST_SAMPLES, help="Number of samples.")] = 2_000,
    long: Annotated[int, typer.Option(help="Number of steps of the run that errors are measured against.")] = 1000,
    reference: Annotated[
        str | None, typer.Option(help="Also score against real images: fashion, or a folder of data reference.")
    ] = None,
    folder: Annotated[Path, typer.Option("--out", help="A folder for table, figure and results.")] = Path(
        "runs/solvers"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Device = "auto",
) -> None:
    """Compare a teacher's solvers: the error to a long run from the same noise, and quality, by evaluations."""
    from fewstep.api.solvers import compare_solvers
    from fewstep.eval.solver_comparison import best_grids, table_rows

    budgets = parse_numbers(nfe, int, "--nfe")
    if guidance != 1 and any(count < 2 for count in budgets):
        raise UserError("A guided step costs two evaluations.")
    with counting("sampling") as progress:
        lines = compare_solvers(
            model_name, solvers=parse_names(solvers, "--solvers"), nfe=budgets,
            grids=parse_names(grids, "--grids"), guidance=guidance, n=n, long=long, reference=reference, folder=folder,
            seed=seed, device=device, progress=progress,
        )  # fmt: skip
    score = "" if reference is None else f"; in brackets the Fréchet distance {lines[0].metric}"
    print_text(
        f"Root mean square difference from samples of {long} steps of unipc_3, in the model's range{score}. Lower is "
        "better."
    )
    print_table(table_rows(best_grids(lines)))
    print_text(f"All grids, the table and the figure are in {folder}.")


@app.command("fit-v3", epilog="Example: fewstep solver fit-v3 fashion --n 512 --out statistics.safetensors")
def fit_v3(
    model_name: ModelName,
    file: Annotated[
        Path,
        typer.Option(
            "--out",
            help="A file. The solver reads statistics-2.safetensors (for guidance 2) or statistics.safetensors "
            "beside the model's weights.",
        ),
    ],
    n: Annotated[
        int, typer.Option("--n", max=MOST_SAMPLES, help="Samples of the model that expectations are taken over.")
    ] = 1024,
    intervals: Annotated[
        int, typer.Option(help="Number of intervals in log-SNR between which statistics are measured.")
    ] = 120,
    guidance: GuidanceScale = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of samples and noise.")] = 0,
    device: Device = "auto",
) -> None:
    """Measure the statistics of a model that DPM-Solver-v3 needs. Continues an interrupted call."""
    from fewstep.api import solvers

    with counting("measuring") as progress:
        solvers.fit_v3(
            model_name, file, n=n, intervals=intervals, guidance=guidance, seed=seed, device=device, progress=progress
        )
    print_text(f"The statistics are in {file}.")


@app.command("fit-dc", epilog="Example: fewstep solver fit-dc fashion --steps 5,8 --out dc_solver.json")
def fit_dc(
    model_name: ModelName,
    file: Annotated[
        Path, typer.Option("--out", help="A file. The solver reads dc_solver.json beside the model's weights.")
    ],
    steps: Annotated[str, typer.Option(help="Numbers of steps.")] = "5,6,8,10",
    guidance: Annotated[str, typer.Option(help="Guidance scales.")] = "2",
    order: Annotated[int, typer.Option(help="Order of the UniPC predictor that is corrected.")] = 2,
    grid: Annotated[str, typer.Option(help="The spacing of times that the ratios are for.")] = "time",
    n: Annotated[int, typer.Option("--n", max=MOST_SAMPLES, help="Samples that the search uses.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Device = "auto",
) -> None:
    """Search the ratios that DC-Solver needs for a model."""
    from fewstep.api import solvers

    with counting("searching") as progress:
        solvers.fit_dc(
            model_name, file, steps=parse_numbers(steps, int, "--steps"), order=order,
            guidance=parse_numbers(guidance, float, "--guidance"), n=n, grid=grid, seed=seed, device=device,
            progress=progress,
        )  # fmt: skip
    print_text(f"The ratios are in {file}.")
