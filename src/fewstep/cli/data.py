"""``fewstep data``: commands that create the files that training and evaluation read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import (
    Batch,
    Captions,
    Device,
    GuidanceScale,
    ModelName,
    Seed,
    Size,
    Solver,
    Steps,
    counting,
    parse_size,
    print_text,
    progress_bar,
    sampling_of,
)  # fmt: skip
from fewstep.core.errors import UserError
from fewstep.core.limits import MOST_SAMPLES

app = typer.Typer(no_args_is_help=True, help="Create the files that training and evaluation read.")


@app.command(epilog="Example: fewstep data encode prompts.txt --teacher fashion-text --out runs/prompts")
def encode(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS",
            help="A text file, one prompt per line; a table (.csv, .jsonl, .parquet) with a column of captions, and "
            "perhaps one of images (files in its folder) or two of a preference (winner, loser); a folder of images + "
            ".txt.",
        ),
    ],
    teacher: Annotated[str, typer.Option(help="A diffusers pipeline, by folder or hub id.")],
    folder: Annotated[
        Path, typer.Option("--out", help="A folder; training reads it with data.kind=prompts data.path=FOLDER.")
    ],
    column: Annotated[
        str | None, typer.Option(help="Captions of a table. Default: the column caption, prompt or text.")
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(
            help="For images and videos: HEIGHTxWIDTH,...; each is scaled to the nearest. Default: the pipeline's size."
        ),
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="For videos (.mp4, .gif): number of frames.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Prompts per batch.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Prompts per file of the output.")] = 512,
    device: Device = "auto",
) -> None:
    """Encode prompts (and images) once, so that training needs no encoder. Continues an interrupted call."""
    from fewstep.api import data

    wanted = [size for text in sizes.split(",") if (size := parse_size(text))] if sizes else []
    if any(count != 1 for _, _, count in wanted):
        raise UserError(f"--sizes takes HEIGHTxWIDTH, got {sizes!r}: give the number of frames with --frames.")
    with counting("encoding") as progress:
        n = data.encode(
            teacher, prompts, folder, column=column, sizes=[size[:2] for size in wanted], frames=frames, batch=batch,
            rows=rows, device=device, progress=progress,
        )  # fmt: skip
    print_text(f"{n} are encoded in {folder}.")


@app.command(epilog="Example: fewstep data reference photos --size 64x64 --crop --out runs/photos_reference")
def reference(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder of images (a subfolder per class) or of idx files, an .npz file, a table (.csv, .jsonl, "
            ".parquet), or a data set on the hub.",
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", help="A new folder for the reference.")],
    test: Annotated[
        str | None,
        typer.Option(
            help="Real images to score against, which nothing learns from; like IMAGES. Default: some of IMAGES."
        ),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Without --test: the share of IMAGES that is held out for scores.")
    ] = 0.2,
    size: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH, as the model generates. Default: the first image's.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1: grey, 3: RGB, as the model generates. Default: the first image's.")
    ] = None,
    crop: Annotated[
        bool, typer.Option("--crop", help="Scale images of other sizes until they cover it, and crop them.")
    ] = False,
    split: Annotated[str, typer.Option(help="Of a data set on the hub, or idx files: the split.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Of a data set on the hub: the subset.")] = None,
    label: Annotated[
        str | None, typer.Option(help="The column of labels in a table or .npz file. Default: label, cls, …")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="The column of images in a table or .npz file. Default: image, file_name, …")
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="classifier (trained on the labels), efficientnet, dinov2, inception, or random. Default: a "
            "classifier if there are labels, else efficientnet if its extra is installed, else random."
        ),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="A folder with the weights of dinov2 or inception.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of the classifier's training. Default: 6; more for small sets.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the classifier's training, and of the images held out.")] = 0,
    device: Device = "cpu",
) -> None:
    """Write a reference, by which models are scored: features of real images, and some of the images."""
    from fewstep.api.reference import make_reference
    from fewstep.core.image_data import ImageData, kind_of
    from fewstep.core.image_rows import Columns
    from fewstep.eval.references import read_reference

    def described(path: str) -> ImageData:
        kind = kind_of(path)
        if (image or label) and kind in ("folder", "idx"):
            raise UserError(
                f"--image and --label name columns of a table; {path} is a folder without one: remove them."
            )
        return ImageData(kind, path, split, subset, Columns(image=image, label=label), crop)

    wanted = parse_size(size)
    if wanted is not None and wanted[2] != 1:
        raise UserError(f"--size takes HEIGHTxWIDTH, got {size!r}.")
    if channels not in (None, 1, 3):
        raise UserError(f"--channels is 1 (grey) or 3 (RGB), got {channels}.")
    with progress_bar() as bar:
        task = bar.add_task("training the classifier", total=None)
        result = make_reference(
            described(images), folder, test=described(test) if test is not None else None, share=share,
            size=wanted[:2] if wanted is not None else None, channels=channels, network=network, epochs=epochs,
            seed=seed, weights=weights, device=device,
            progress=lambda step, steps, loss: bar.update(task, completed=step, total=steps),
        )  # fmt: skip
    made = read_reference(folder)
    depth, height, width = made.shape
    print_text(
        f"{folder} compares {height} x {width} {'grey' if depth == 1 else 'RGB'} images in features of {made.network}: "
        f"{made.images['train']} learned from, {made.images['test']} held out. Real images score:"
    )
    print_text("  ".join(f"{name} {value:.4f}" for name, value in result.items()))


@app.command("ode-pairs", epilog="Example: fewstep data ode-pairs fashion --n 10000 --out runs/pairs.safetensors")
def ode_pairs(
    model_name: ModelName,
    file: Annotated[
        Path, typer.Option("--out", help="A safetensors file; training reads it with data.kind=tensors data.path=FILE.")
    ],
    n: Annotated[int, typer.Option("--n", max=MOST_SAMPLES, help="Number of pairs.")] = 10_000,
    captions: Captions = None,
    solver: Annotated[str, typer.Option(help="One of fewstep solver list.")] = "heun",
    steps: Annotated[int, typer.Option(help="Steps.")] = 18,
    guidance: GuidanceScale = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Sample a teacher and keep the noise with the samples: what a regression loss learns from."""
    from fewstep.api import data

    with progress_bar() as bar:
        task = bar.add_task("sampling", total=n)
        data.make_ode_pairs(
            model_name, file, n=n, captions=captions, sampling=sampling_of(solver, steps, guidance, "time", seed),
            device=device, progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    print_text(f"{n} pairs are in {file}.")


@app.command(
    epilog="Example: fewstep data preferences fashion-text --captions captions.txt --reward prompt --out runs/preferred"
)
def preferences(
    model_name: ModelName,
    file: Annotated[Path, typer.Option("--out", help="A safetensors file; of a pipeline a folder.")],
    reward: Annotated[
        str,
        typer.Option(
            help="confidence, symmetry, brightness, or package.module:function; with --captions prompt instead of "
            "confidence."
        ),
    ],
    n: Annotated[int, typer.Option("--n", max=MOST_SAMPLES, help="Number of pairs.")] = 2_000,
    captions: Captions = None,
    size: Size = None,
    batch: Batch = None,
    reference: Annotated[
        str | None, typer.Option(help="A reference with a classifier. Default: that of the model or its run.")
    ] = None,
    candidates: Annotated[
        int, typer.Option(help="Samples per label or caption; the best and the worst become a pair.")
    ] = 4,
    solver: Solver = None,
    steps: Steps = None,
    guidance: GuidanceScale = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Sample a model several times per label or caption, and keep the best and the worst by a reward as a pair.

    For training with data.kind=tensors; of a pipeline data.kind=prompts, and the same call continues an interrupted
    one.
    """
    from fewstep.api import data

    with progress_bar() as bar:
        task = bar.add_task("sampling", total=n * candidates)
        ties = data.make_preferences(
            model_name, file, reward=reward, n=n, candidates=candidates, captions=captions, size=parse_size(size),
            sampling=sampling_of(solver, steps, guidance, "time", seed), reference=reference, batch=batch,
            device=device, progress=lambda done: bar.update(task, completed=done),
        )  # fmt: skip
    print_text(f"{n} pairs are in {file}.")
    if ties:
        print_text(
            f"In {ties} of them all candidates have the same reward, so that they teach nothing: more --candidates, or "
            "another reward, may tell them apart.", "yellow",
        )  # fmt: skip
