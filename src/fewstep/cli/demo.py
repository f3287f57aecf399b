"""``fewstep demo``: bundled examples end to end."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from fewstep.cli.options import counting, print_scores, print_text, sampling_bar
from fewstep.cli.train import run_training
from fewstep.core.errors import UserError

app = typer.Typer()


class Demo(NamedTuple):
    """A run of ``config`` in ``folder``, scored by ``samples`` and shown in ``columns`` images per model."""

    config: str
    folder: Path
    samples: int
    columns: int


EMOJI = Demo("configs/emoji/demo.yaml", Path("runs/demo"), 1_024, 10)
FASHION = Demo("configs/fashion/demo.yaml", Path("runs/demo_fashion"), 10_000, 20)
VIDEO = Demo("configs/emoji_video/demo.yaml", Path("runs/demo_video"), 512, 8)
TEXT = Demo("configs/fashion_text/demo.yaml", Path("runs/demo_text"), 1_440, 10)


@app.command(epilog="Example: fewstep demo --out runs/demo")
def demo(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The run folder, by default runs/demo, runs/demo_video, …. A finished demo in it is kept.",
        ),
    ] = None,
    video: Annotated[bool, typer.Option("--video", help="Distil emoji-video: clips of eight frames.")] = False,
    fashion: Annotated[bool, typer.Option("--fashion", help="Distil fashion: class labels, 28 x 28 grey.")] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Distil fashion-text, a diffusers pipeline; needs the extra diffusers.")
    ] = False,
) -> None:
    """Distil a bundled teacher, score the student and write a report: a few minutes on a laptop.

    Without an option it is the teacher of emoji, which takes prompts such as "a shiny fox on blue". For a shorter
    training: fewstep train configs/emoji/demo.yaml stages.0.steps=100.
    """
    from fewstep.api.data import encode
    from fewstep.api.evaluate import evaluate
    from fewstep.api.report import compare_images, report
    from fewstep.distill.config_files import find_config, load_config
    from fewstep.distill.run_folder import run_config
    from fewstep.eval.report.tables import best_teacher
    from fewstep.eval.score_files import read_scores

    if video + fashion + text > 1:
        raise UserError("Give one of --video, --fashion and --text.")
    chosen = VIDEO if video else FASHION if fashion else TEXT if text else EMOJI
    folder, config, overrides = folder or chosen.folder, chosen.config, list[str]()
    if folder.name in ("", ".."):
        raise UserError(f"--out {folder} has no name of its own; name a folder, for example --out runs/demo.")
    if text:
        captions = folder.with_name(f"{folder.name}_captions")
        overrides = [f"data.path={captions}"]
        with counting("encoding captions") as encoding:
            encode("fashion-text", find_config(config).with_name("captions.txt"), captions, progress=encoding)
    wanted, folder = folder, unfinished(folder)
    if folder != wanted:
        print_text(f"{wanted} contains a finished demo: this one is in {folder}.")
    if (folder / "config.yaml").is_file():
        if run_config(folder) != load_config(config, [f"out={folder}", *overrides]):
            raise UserError(f"{folder} contains another run than the demo; choose another folder with --out.")
        print_text(f"{folder} contains an unfinished demo: resuming it.")
        run_training(None, [], folder)
    else:
        run_training(config, [f"out={folder}", *overrides], None)
    with sampling_bar(chosen.samples) as progress:
        evaluate(folder, n=chosen.samples, progress=progress)
    images = compare_images(folder, columns=chosen.columns)
    print_text("Teacher (its best setting within each number of evaluations) and student:")
    print_scores(best_teacher(read_scores(folder / "eval.json")))
    print_text(f"Teacher and student side by side: {images}\nThe report: {report(folder)}")


def unfinished(folder: Path) -> Path:
    """``folder``, or the first of ``folder-2``, ``folder-3``, ... that has no finished demo."""
    names = (folder if k == 1 else folder.with_name(f"{folder.name}-{k}") for k in count(1))
    return next(name for name in names if not (name / "report.html").exists())
