"""``fewstep eval``: scores of models and of images, statistics of real images, and two files of scores side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fewstep import measure
from fewstep.distill.devices import pick_device
from fewstep.distill.terminal import Device, Grid, out, parse_numbers, print_scores, sampling_bar
from fewstep.errors import UserError
from fewstep.eval.by_protocol import write_reference
from fewstep.eval.images import is_image_set
from fewstep.eval.networks.weights import Place
from fewstep.eval.protocol import load_protocol
from fewstep.eval.scores import read_scores
from fewstep.eval.tables import side_by_side

app = typer.Typer()
What = Annotated[
    str | None, typer.Argument(metavar="WHAT", help="A run, a model, or images: a folder, .zip, .tar or .npz.")
]


@app.command("eval")
def evaluate(
    source: What = None,
    protocol: Annotated[str | None, typer.Option(help="What is measured: one that ships, or a YAML file.")] = None,
    reference: Annotated[str | None, typer.Option(help="Instead of the protocol's; without one: fashion.")] = None,
    captions: Annotated[str | None, typer.Option(help="Instead of the protocol's: a text file, one a line.")] = None,
    steps: Annotated[str | None, typer.Option(help="One or several; 1,2,4 by default.")] = None,
    nfe: Annotated[str | None, typer.Option(help="Instead of --steps: as many as fit in these evaluations.")] = None,
    solver: Annotated[str | None, typer.Option(help="Student, or any that fewstep sweep lists.")] = None,
    guidance: Annotated[str, typer.Option(help="One or several scales, for example 1,2.")] = "1",
    grid: Grid = "time",
    n: Annotated[int | None, typer.Option("--n", help="Samples a combination; 10,000 or the protocol's.")] = None,
    seed: Annotated[int | None, typer.Option(help="0, or the protocol's.")] = None,
    file: Annotated[
        Path | None, typer.Option("--json", help="A file to merge the scores into (for a run: its eval.json).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What tables call it; by default its folder's name.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the metrics' networks: a folder, or a file.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Fetch weights that are nowhere.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be scored.")] = False,
    stats: Annotated[
        Path | None, typer.Option("--write-stats", help="Only write the statistics of WHAT, to be a reference.")
    ] = None,
    compare: Annotated[tuple[Path, Path] | None, typer.Option(help="Only compare two files of scores.")] = None,
    device: Device = "auto",
) -> None:
    """Score a model or images: Fréchet distances, KID, precision, recall, CLIP scores, ... as a protocol says."""
    if compare is not None:
        head, *body = side_by_side(*(read_scores(one) for one in compare))
        table = Table(*head)
        for row in body:
            table.add_row(*row)
        out.print(table)
        return
    if source is None:
        raise UserError("Name what is to be scored: a run, a model, or images.")
    if steps and nfe:
        raise UserError("Give --steps or --nfe, not both.")
    images = is_image_set(Path(source))
    if protocol is None and (images or stats):
        raise UserError("Images are scored by a protocol: give --protocol.")
    if protocol is None and (captions or weights or download or skip_bad):
        raise UserError("--captions, --weights, --download and --skip-bad belong to a protocol: give --protocol.")
    settings = load_protocol(protocol, reference=reference, captions=captions, n=n, seed=seed) if protocol else None
    place = Place.of(weights, download)
    if settings is not None and stats is not None:
        for written in write_reference(Path(source), settings, str(stats), place, pick_device(device), skip_bad):
            out.print(f"The statistics are in {written}.")
        return
    if settings is not None and images:
        scores = measure.evaluate_images(
            source, settings, place, skip_bad=skip_bad, device=device, json_file=file, name=name
        )
    else:
        with sampling_bar(settings.n if settings else n or 10_000) as progress:
            scores = measure.evaluate(
                source, protocol=settings, place=place, reference=reference or "fashion",
                steps=parse_numbers(steps or "1,2,4", int, "--steps"),
                nfe=parse_numbers(nfe, int, "--nfe") if nfe else [], solver=solver.split(",") if solver else [],
                guidance=parse_numbers(guidance, float, "--guidance"), grid=grid, n=n or 10_000, seed=seed or 0,
                device=device, json_file=file, name=name, progress=progress,
            )  # fmt: skip
    print_scores(scores)
