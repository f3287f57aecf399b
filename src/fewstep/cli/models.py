"""Commands that use a model: sample, export."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import (
    Device,
    Grid,
    GuidanceScale,
    ModelName,
    Solver,
    Steps,
    counted,
    counting,
    parse_names,
    parse_seeds,
    parse_size,
    print_text,
    refuse,
    sampling_of,
)  # fmt: skip
from fewstep.core.errors import UserError
from fewstep.models.hub.export_format import ExportFormat

app = typer.Typer()


class Video(StrEnum):
    """The format of videos; MP4 needs the extra ``video``."""

    gif = "gif"
    mp4 = "mp4"


class WeightType(StrEnum):
    """The type of a network's weights, as torch names it."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command(epilog="Example: fewstep sample fashion --steps 16 --n 80 --out grid.png")
def sample(
    model_name: ModelName,
    n: Annotated[
        int | None,
        typer.Option("--n", help="For class labels: number of images, by default 80. For prompts see --seeds."),
    ] = None,
    steps: Steps = None,
    prompt: Annotated[str | None, typer.Option(help="What to show, for a text-conditioned model.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, one prompt per line, or a table.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds for each prompt: 0-3 or 0,5,7. Default: --seed.")] = None,
    size: Annotated[
        str | None, typer.Option(help="For pipelines: HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES in pixels.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts per batch. Default: 8.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Class labels, for example 0,1,2 or bee,cat. Default: all in turn.")
    ] = None,
    solver: Solver = None,
    guidance: GuidanceScale = 1.0,
    grid: Grid = "time",
    seed: Annotated[int | None, typer.Option(help="Seed of the noise. Default: 0.")] = None,
    frames: Annotated[int | None, typer.Option(help="For a causal model of videos: number of frames.")] = None,
    video: Annotated[
        Video | None, typer.Option(help="For prompts of a model of videos: the format of the files. Default: gif.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="For class labels a PNG file, or GIF for videos; for prompts a folder. Default: grid.png, or samples.",
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Generate images or videos: of class labels one grid, of prompts one file each. Existing files are kept."""
    from fewstep.api.models import load
    from fewstep.api.sample import sample as sample_labels
    from fewstep.api.sample import sample_files
    from fewstep.core.files import check_writable, write_unused
    from fewstep.core.image_grid import save_grid
    from fewstep.core.tables import read_texts

    chosen = None if labels is None else parse_names(labels, "--labels")
    sampling = replace(sampling_of(solver, steps, guidance, grid, seed or 0), frames=frames)
    if prompt is not None:
        refuse("--prompt is the only prompt", prompts=prompts)
    if seeds is not None:
        refuse("--seeds lists all seeds", seed=seed)
    model = load(model_name, device, parse_size(size))
    if prompt is not None or prompts is not None:
        if model.config.classes:
            raise UserError("This model takes class labels, not prompts: use --labels.")
        if model.config.unconditional:
            raise UserError("This model is unconditional: it takes no prompts.")
        refuse("This model takes prompts, one sample for each of --seeds", n=n, labels=labels)
        if len(model.config.shape) != 4:
            refuse("This model generates images", video=video)
        file = file or Path("samples")
        if file.suffix:
            raise UserError(f"--out is a folder for prompts, with one file each; {file} looks like a file.")
        lines = [prompt] if prompt is not None else read_texts(prompts or Path())
        with counting("sampling") as progress:
            written = sample_files(
                model, lines, file, seeds=parse_seeds(seeds, sampling.seed), batch=batch or 8, sampling=sampling,
                video=(video or Video.gif).value, progress=progress,
            )  # fmt: skip
        print_text(f"{counted(len(written), 'sample')} in {file}.")
        return
    if model.config.takes_prompts:
        raise UserError("This model takes prompts: give --prompt TEXT, or --prompts FILE with one per line.")
    refuse("This model takes no prompts", seeds=seeds, size=size, batch=batch, video=video)
    videos = len(model.config.shape) == 4
    wanted, n = file or Path("grid.gif" if videos else "grid.png"), 80 if n is None else n
    made, form, suffixes = ("videos", "GIF", (".gif",)) if videos else ("images", "PNG", (".png", ""))
    if wanted.suffix.lower() not in suffixes:
        raise UserError(
            f"This model generates {made}, whose grid is a {form}: --out must end in {suffixes[0]}, {wanted} does not."
        )
    check_writable(wanted)
    images = sample_labels(model, n=n, labels=chosen, sampling=sampling)
    columns = len(chosen) if chosen and len(chosen) > 1 else min(n, model.config.classes or 10)
    file = write_unused(wanted, lambda part: save_grid(images, part, columns))
    kept = "" if file == wanted else f" {wanted} was there before and is kept."
    print_text(f"{counted(n, 'video' if videos else 'image')} in {file}.{kept}")


@app.command(epilog="Example: fewstep export runs/mine --to lora --out my_lora")
def export(
    model_name: ModelName,
    folder: Annotated[Path, typer.Option("--out", help="A new folder for the export.")],
    form: Annotated[
        ExportFormat,
        typer.Option(
            "--to",
            help="diffusers: a pipeline; merged: its network alone; lora: an adapter; comfyui: an adapter for ComfyUI.",
        ),
    ] = ExportFormat.diffusers,
    device: Device = "cpu",
    dtype: Annotated[
        WeightType | None, typer.Option(help="The type of a network's weights. Default: that of the base's weights.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of images on the model card, for prompts of the run.")
    ] = 8,
    push: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Also upload it to a repository of the Hugging Face hub."),
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="With --push: the repository. Default: private.")
    ] = None,
) -> None:
    """Write a student of a diffusers pipeline as a pipeline, a bare network or a LoRA file, and compare the two.

    A student of another teacher needs no export: fewstep.load reads its folder, RUN/student, anywhere.

    Nothing is uploaded without --push, which needs a token (HF_TOKEN, or hf auth login).
    """
    import torch

    from fewstep.api.export import export as export_model

    if push is None:
        refuse("--private and --public are for --push", **{"public" if private is False else "private": private})
    written = export_model(
        model_name, form, folder, device, None if dtype is None else getattr(torch, dtype), samples=samples, push=push,
        private=private is not False,
    )  # fmt: skip
    print_text(f"The student is in {written}. It was reloaded and gives the same output.")
    if push is not None:
        print_text(f"It was uploaded to https://huggingface.co/{push}.")
