"""Commands that measure models: eval, compare, winrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import (
    GRID_HELP,
    Batch,
    Captions,
    Device,
    GuidanceScale,
    JsonFile,
    ModelName,
    Seed,
    Size,
    Solver,
    Steps,
    check_json,
    counting,
    note_checkpoint,
    parse_names,
    parse_numbers,
    parse_size,
    print_scores,
    print_table,
    print_text,
    sampling_bar,
    sampling_of,
    write_json,
)  # fmt: skip
from fewstep.core.errors import UserError
from fewstep.core.limits import MOST_SAMPLES

app = typer.Typer()


@app.command("eval", epilog="Example: fewstep eval runs/demo --n 1024 --steps 1,2,4")
def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_IMAGES",
            callback=note_checkpoint,
            help="A run, a checkpoint or a model, or images: a folder, .zip, .tar or .npz.",
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(
            help="What is measured: the name of a file in configs/eval, or a file of yours. Default: by --reference."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Real images to compare with: a folder of fewstep data reference, or bundled: emoji, fashion, …; with "
            "--protocol also images or their statistics. Default: the protocol's, or that of the run "
            "or its teacher."
        ),
    ] = None,
    captions: Annotated[
        str | None, typer.Option(help="Instead of the protocol's: a text file, one per line, or a table.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="Numbers of steps, each scored: 1,2,4 (default), or that of a grid times:….")
    ] = None,
    nfe: Annotated[
        str | None, typer.Option(help="Instead of --steps, network evaluations: as many steps as each allows.")
    ] = None,
    solver: Annotated[
        str | None,
        typer.Option(help="One or several of fewstep solver list, or student. Default: student, else euler."),
    ] = None,
    guidance: Annotated[str | None, typer.Option(help="Guidance scales. Default: 1, which is off.")] = None,
    grid: Annotated[str | None, typer.Option(help=GRID_HELP + " Default: time.")] = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=1, max=MOST_SAMPLES, help="Samples per combination. Default: 10,000, or the protocol's."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise. Default: 0, or the protocol's.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Merge the scores into this file; - prints them as JSON. Default for a run: its eval.json.",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in tables. Default: its folder's name.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the metrics' networks: a folder, or a file.")] = None,
    download: Annotated[bool, typer.Option("--download", help="Download missing weights.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be scored.")] = False,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--write-stats", help="Write only the statistics of the images to this file, for a protocol's reference."
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a model or images: Fréchet distances, KID, precision, recall, CLIP scores, ... as a protocol specifies."""
    from fewstep.api.evaluate import evaluate as evaluate_model
    from fewstep.api.evaluate import evaluate_images
    from fewstep.api.models import refuse_reference
    from fewstep.core.devices import pick_device
    from fewstep.eval.evaluate_protocol import write_reference
    from fewstep.eval.image_sources import is_image_set
    from fewstep.eval.networks.weights import WeightsLocator
    from fewstep.eval.protocol import load_protocol
    from fewstep.eval.score_files import to_json

    if steps and nfe:
        raise UserError("Give --steps or --nfe, not both.")
    _check_exists(source)
    refuse_reference(source)
    images = is_image_set(Path(source))
    sampling = {
        "--steps": steps, "--nfe": nfe, "--solver": solver, "--guidance": guidance, "--grid": grid, "--seed": seed
    }  # fmt: skip
    if (images or stats) and (given := [option for option, value in sampling.items() if value is not None]):
        raise UserError(f"{', '.join(given)}: images on disk are scored as they are, without sampling; remove it.")
    if stats and (file is not None or name is not None):
        raise UserError("--write-stats writes statistics and no scores: remove --json and --name.")
    if protocol is None and (images or stats):
        raise UserError("Images are scored by a protocol: give --protocol with its name or file (docs/evaluation.md).")
    if protocol is None and (captions or weights or download or skip_bad):
        raise UserError("--captions, --weights, --download and --skip-bad belong to a protocol: give --protocol.")
    settings = load_protocol(protocol, reference=reference, captions=captions, n=n, seed=seed) if protocol else None
    locator = WeightsLocator.from_environment(weights, download)
    scores_file = None if file is not None and str(file) == "-" else file
    if settings is not None and stats is not None:
        with counting("reading images") as count:
            files, remarks = write_reference(
                Path(source), settings, str(stats), locator, pick_device(device), skip_bad, count
            )
        for text in (*(f"The statistics are in {written}." for written in files), *remarks):
            print_text(text)
        return
    if settings is not None and images:
        with sampling_bar(settings.n) as progress:
            scores = evaluate_images(
                source, settings, locator, skip_bad=skip_bad, device=device, json_file=scores_file, name=name,
                progress=progress,
            )  # fmt: skip
    else:
        samples = 10_000 if n is None else n
        with sampling_bar(settings.n if settings else samples) as progress:
            scores = evaluate_model(
                source, protocol=settings, locator=locator, reference=reference,
                steps=parse_numbers(steps, int, "--steps") if steps else [],
                nfe=parse_numbers(nfe, int, "--nfe") if nfe else [], solver=parse_names(solver, "--solver"),
                guidance=parse_numbers(guidance or "1", float, "--guidance"), grid=grid or "time",
                n=samples, seed=seed or 0, device=device, json_file=scores_file, name=name, progress=progress,
            )  # fmt: skip
    if file is not None and scores_file is None:
        write_json(to_json(scores), file)
    else:
        print_scores(scores)


def _check_exists(source: str) -> None:
    """Raises ``UserError`` if ``source`` is certainly a path, of nothing."""
    from fewstep.core.paths import is_hub_id, nearest_folder
    from fewstep.core.registry import is_dotted
    from fewstep.models.loading import bundled_models

    if not Path(source).exists() and not is_dotted(source) and not is_hub_id(source) and source not in bundled_models():
        known, hint = ", ".join(bundled_models()), nearest_folder(Path(source)) if "/" in source else ""
        raise UserError(
            f"{source} does not exist: give a run, a model or pipeline folder, a bundled model ({known}), or images (a "
            f"folder, .zip, .tar or .npz){hint}."
        )


@app.command(epilog="Example: fewstep compare runs/a/eval.json runs/b/eval.json")
def compare(
    ours: Annotated[Path, typer.Argument(metavar="A.json", help="A file of scores.")],
    theirs: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    file: JsonFile = None,
) -> None:
    """Compare two files of scores, and print whether their values are comparable."""
    from fewstep.eval.report.tables import side_by_side
    from fewstep.eval.score_files import read_scores

    check_json(file, ours, theirs)
    head, *body = rows = side_by_side(read_scores(ours), read_scores(theirs))
    if not body:
        raise UserError(
            f"{ours} and {theirs} have no metric in common at one setting (solver, guidance, steps, number of "
            "samples): score both by one --reference with the same options."
        )
    if file is not None:
        write_json([dict(zip(head, row, strict=True)) for row in body], file)
    else:
        print_table(rows)


@app.command(epilog="Example: fewstep winrate runs/tuned runs/demo --n 1000")
def winrate(
    ours: ModelName,
    theirs: Annotated[
        str, typer.Argument(metavar="OTHER", callback=note_checkpoint, help="The model to compare with, as MODEL.")
    ],
    n: Annotated[int, typer.Option("--n", min=1, max=MOST_SAMPLES, help="Samples of each.")] = 2_000,
    captions: Captions = None,
    rewards: Annotated[
        str | None,
        typer.Option(help="Names or functions as for data preferences --reward, separated by commas. Default: all."),
    ] = None,
    size: Size = None,
    batch: Batch = None,
    reference: Annotated[
        str | None, typer.Option(help="A reference with a classifier. Default: that of the model or its run.")
    ] = None,
    solver: Solver = None,
    steps: Steps = None,
    guidance: GuidanceScale = 1.0,
    seed: Seed = 1,
    file: JsonFile = None,
    device: Device = "auto",
) -> None:
    """Measure how often a model's samples score higher on each reward than another model's, from equal noise.

    Models that take prompts need --captions.
    """
    from fewstep.api.evaluate import win_rates

    check_json(file, *([captions] if captions is not None else []))
    results = win_rates(
        ours, theirs, n=n, captions=captions, rewards=parse_names(rewards, "--rewards"), size=parse_size(size),
        sampling=sampling_of(solver, steps, guidance, "time", seed), reference=reference, batch=batch, device=device,
    )  # fmt: skip
    if file is not None:
        write_json(results, file)
        return
    rows = [("reward", "win rate", "95 % interval", "mean", "mean of the other")]
    for r in results:
        interval = f"{r['low']:.3f} to {r['high']:.3f}"
        rows.append((r["reward"], f"{r['win_rate']:.3f}", interval, f"{r['ours']:.3f}", f"{r['theirs']:.3f}"))
    print_table(rows)
