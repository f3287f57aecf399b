"""Commands about runs: train, explain, replay, report."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fewstep.cli.options import (
    ConfigFile,
    JsonFile,
    Overrides,
    RunFolder,
    err,
    leave,
    print_table,
    print_text,
    write_json,
)  # fmt: skip
from fewstep.core.errors import UserError

app = typer.Typer()
Resume = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Continue this run with its own config; key=value changes settings.")
]


@app.command(epilog="Example: fewstep train configs/fashion/demo.yaml seed=1 out=runs/demo-1")
def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="Not needed with --resume.")] = None,
    overrides: Overrides = None,
    resume: Resume = None,
) -> None:
    """Distil a teacher into a few-step student or, for a config with model:, pretrain a network on data."""
    run_training(config, overrides or [], resume)


def run_training(config: str | None, overrides: list[str], resume: Path | None) -> Path:
    """Trains with a progress bar; Ctrl-C ends the process with code 130."""
    from fewstep.api.train import train_run
    from fewstep.cli.training_progress import TrainingProgress
    from fewstep.core.devices import pick_device
    from fewstep.distill.callback import Interrupted
    from fewstep.distill.config_files import load_config
    from fewstep.distill.run_folder import run_config

    if resume is None and config is None:
        raise UserError("Name a config, for example configs/fashion/demo.yaml, or a run to --resume.")
    if resume is not None and config is not None:
        if "=" not in config:
            raise UserError(f"With --resume the run's own config is used, so {config!r} is not: leave it out.")
        overrides, config = [config, *overrides], None
    settings = run_config(resume, overrides) if resume is not None else load_config(config or "", overrides)
    print_text(f"Device: {pick_device(settings.device).type}. Attention: {settings.attention}.")
    try:
        with TrainingProgress(settings.steps) as progress:
            run = train_run(settings, resume, callbacks=[progress])
    except Interrupted as stop:
        command = f"fewstep train --resume {shlex.quote(str(stop.folder))}"
        print_text(f"\nInterrupted: {stop}. Continue with: {command}", "yellow", err)
        leave(130)
    trained, student = run.trainer, run.folder / "student"
    if progress.steps_done:
        print_text(f"Trained {trained.step} steps in {trained.seconds:.0f} s. The student is in {student}.")
    else:
        print_text(f"All {trained.step} steps of this run were done already. The student is in {student}.")
    return run.folder


@app.command(epilog="Example: fewstep explain configs/fashion/demo.yaml")
def explain(config: ConfigFile, overrides: Overrides = None, file: JsonFile = None) -> None:
    """Explain a config: the method's equations, its updates and what they cost, where it departs from the paper.

    Needs neither weights nor data nor internet access.
    """
    from fewstep.distill.config_files import load_config
    from fewstep.distill.explain import explain as explain_config

    stages = explain_config(load_config(config, overrides or []))
    if file is not None:
        write_json([stage.as_dict() for stage in stages], file)
        return
    for number, stage in enumerate(stages):
        print_text(f"stages.{number}: {stage.text}\n")
        rows = [("update", "trains", "due", "evaluations per sample and update: role without + with gradient")]
        for update in stage.updates:
            costs = ", ".join(
                f"{role} {plain:.3g} + {graph:.3g}" for role, (plain, graph) in update.evaluations.items()
            )
            due = "every step" if update.due.n == 1 else f"every {update.due.n} steps"
            rows.append((update.name, ", ".join(update.roles), due, costs))
        print_table(rows)
        print_text(f"Forward passes per sample and step, over all roles: {stage.evaluations_per_step:.3g}.")
        if stage.settings:
            print_table([("setting", "here", "default", "published"), *stage.settings])
        else:
            print_text("All settings of the objective are its defaults.")


@app.command(epilog="Example: fewstep replay runs/demo --step 200")
def replay(run: RunFolder, step: Annotated[int, typer.Option(help="A logged step.")], file: JsonFile = None) -> None:
    """Recompute a logged step from the checkpoint before it and compare every number."""
    from fewstep.core.devices import pick_device
    from fewstep.distill.run_folder import replay_step, run_config

    recorded, computed = replay_step(run, step, pick_device(run_config(run).device))
    if file is not None:
        write_json({"step": step, "recorded": recorded, "computed": computed, "equal": recorded == computed}, file)
    else:
        rows = [(name, repr(recorded.get(name)), repr(value)) for name, value in computed.items()]
        print_table([("quantity", "recorded", "recomputed"), *rows])
    if recorded != computed:
        raise UserError(
            f"Step {step} did not replay bit for bit: other versions, another machine or another number of threads?"
        )
    if file is None:
        print_text(f"Step {step} replayed bit for bit ({len(computed)} numbers).")


@app.command(epilog="Example: fewstep report runs/demo")
def report(run: RunFolder) -> None:
    """Write report.html into a run folder: scores, curves, images, diagnostics, config."""
    from fewstep.api.report import report as write_report

    print_text(f"The report is {write_report(run)}.")
