"""Commands about runs: train, explain, replay, report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fewstep.cli.options import (
    CommandWithSettings,
    ConfigFile,
    JsonFile,
    Overrides,
    RunFolder,
    err,
    leave,
    parse_numbers,
    print_table,
    print_text,
    write_json,
)  # fmt: skip
from fewstep.core.errors import UserError

if TYPE_CHECKING:
    from fewstep.distill.memory import MemoryPlan
    from fewstep.distill.memory_fit import Fit

app = typer.Typer()
Resume = Annotated[
    Path | None, typer.Option(metavar="RUN", help="Continue this run with its own config; key=value changes settings.")
]


@app.command(cls=CommandWithSettings, epilog="Example: fewstep train configs/fashion/demo.yaml seed=1 out=runs/demo-1")
def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A YAML file, or the path of one that ships; not with --resume."),
    ] = None,
    overrides: Overrides = None,
    resume: Resume = None,
) -> None:
    """Distil a teacher into a few-step student or, for a config with model:, pretrain a network on data."""
    run_training(config, overrides or [], resume)


def run_training(config: str | None, overrides: list[str], resume: Path | None) -> Path:
    """Trains and shows progress; Ctrl-C ends the process with code 130."""
    from fewstep.api.train import train_run
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
        run = train_run(settings, resume)
    except Interrupted as stop:
        command = f"fewstep train --resume {shlex.quote(str(stop.folder))}"
        print_text(f"\nInterrupted: {stop}. Continue with: {command}", "yellow", err)
        leave(130)
    best = run.trainer.best
    chosen = f": the averaged weights of step {best['step']}, the best in validation" if best else ""
    print_text(f"The student is in {run.folder / 'student'}{chosen}.")
    return run.folder


@app.command(cls=CommandWithSettings, epilog="Example: fewstep explain configs/fashion/demo.yaml --memory 8,24")
def explain(
    config: ConfigFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(metavar="GiB[,GiB]...", help="Plan the memory for devices of these sizes.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="With --memory: the number of devices, one process each.")] = 1,
    file: JsonFile = None,
) -> None:
    """Explain a config: the method's equations, its updates and what they cost, where it departs from the paper.

    Needs neither weights nor data nor internet access.
    """
    from fewstep.distill.config_files import load_config
    from fewstep.distill.explain import explain as explain_config

    sizes = parse_numbers(memory, float, "--memory") if memory is not None else []
    if not all(0 < size < float("inf") for size in sizes):
        raise UserError(f"--memory takes sizes in GiB above 0, got {memory!r}.")
    if devices > 1 and memory is None:
        raise UserError("--devices is for --memory, which takes the sizes of a device in GiB, for example 24,80.")
    settings = load_config(config, overrides or [])
    stages = explain_config(settings)
    if memory is not None:
        from fewstep.distill.memory import Costs, plan_memory
        from fewstep.distill.memory_fit import first_fit

        counted = Costs()
        with err.status("counting the memory of evaluations: a minute or two for billions of parameters"):
            plan = plan_memory(settings, devices, costs=counted)
            fits = [first_fit(settings, size, devices, counted) for size in sizes]
    if file is not None:
        found = [stage.as_dict() for stage in stages]
        if memory is not None:
            found[plan.stage]["memory"] = plan.as_dict() | {"fits": [fit.as_dict() for fit in fits]}
        write_json(found, file)
        return
    for number, stage in enumerate(stages):
        print_text(f"stages.{number}: {stage.text}\n")
        rows = [("update", "trains", "due", "network evaluations per sample: without + with gradient")]
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
    if memory is not None:
        print_memory(plan, fits, settings.batch * settings.accumulate)


def print_memory(plan: MemoryPlan, fits: Sequence[Fit], samples: int) -> None:
    """Per device: the roles, the most that is needed, and for each size whether it fits or with which overrides."""
    gib = 2**30
    columns = ("weights", "gradients", "moments", "average")
    rows: list[tuple[str, ...]] = [(f"GiB, stages.{plan.stage}", *columns)]
    for name, role in plan.roles.items():
        rows.append((name, *(f"{getattr(role, column) / gib:.3f}" for column in columns)))
    print_table(rows)
    print_text(
        f"At most {in_gib(plan.total)} GiB per device: {in_gib(plan.resident)} stay, and "
        f"{in_gib(plan.total - plan.resident)} are gradients, activations and temporaries ({plan.worst}). "
        f"{samples} samples per update over all devices.",
    )
    for fit in fits:
        if fit.overrides is None:
            text = f"does not fit; the least found is {in_gib(fit.plan.total)} GiB."
        elif fit.overrides:
            text = f"does not fit as it is; {in_gib(fit.plan.total)} GiB with {shlex.join(fit.overrides)}"
        else:
            text = "fits."
        print_text(f"{fit.gib:g} GiB: {text}")


def in_gib(size: int) -> str:
    """Bytes as GiB with two decimals, or two digits if that is more."""
    gib = size / 2**30
    return f"{gib:.2f}" if gib >= 0.1 else f"{gib:.2g}"


@app.command(epilog="Example: fewstep replay runs/demo --step 200")
def replay(
    run: RunFolder, step: Annotated[int, typer.Option(help="A step that metrics.jsonl has.")], file: JsonFile = None
) -> None:
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
            f"Step {step} did not replay bit for bit: other versions, another machine or device, another number of "
            "processes or threads, or CUDA graphs?"
        )
    if file is None:
        print_text(f"Step {step} replayed bit for bit ({len(computed)} numbers).")


@app.command(epilog="Example: fewstep report runs/demo")
def report(run: RunFolder) -> None:
    """Write report.html into a run folder: scores, curves, images, diagnostics, config."""
    from fewstep.api.report import report as write_report

    print_text(f"The report is {write_report(run)}.")
