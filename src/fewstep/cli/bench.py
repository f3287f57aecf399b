"""``fewstep bench``: methods at one budget of evaluations, and what training and sampling cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.options import (
    CommandWithSettings,
    ConfigFile,
    Device,
    JsonFile,
    ModelName,
    Overrides,
    check_json,
    print_scores,
    print_text,
    progress_bar,
    write_json,
)  # fmt: skip

app = typer.Typer(no_args_is_help=True, help="Compare methods at one budget, and measure what a step costs.")
Rounds = Annotated[int, typer.Option(min=2, help="Number of measurements; medians are reported.")]
GIB = 2**30


@app.command(
    cls=CommandWithSettings, epilog="Example: fewstep bench objectives configs/fashion/objectives.yaml seeds=[0]"
)
def objectives(config: ConfigFile, overrides: Overrides = None, device: Device = "auto") -> None:
    """Train several methods from one teacher at one budget of evaluations, several seeds each, and compare them."""
    from fewstep.api.bench_objectives import bench_objectives
    from fewstep.distill.callback import Callback
    from fewstep.distill.trainer import Trainer

    with progress_bar() as bar:

        class RunProgress(Callback):
            def __init__(self, name: str) -> None:
                self.task = bar.add_task(name)

            def on_step(self, trainer: Trainer) -> None:
                bar.update(self.task, completed=trainer.step, total=trainer.config.steps)

        scores = bench_objectives(config, *overrides or [], progress=RunProgress, device=device)
    print_scores(scores)


@app.command(cls=CommandWithSettings, epilog="Example: fewstep bench step configs/fashion/demo.yaml")
def step(config: ConfigFile, overrides: Overrides = None, file: JsonFile = None, rounds: Rounds = 15) -> None:
    """Time training steps against their network evaluations alone, in turn in one process."""
    from fewstep.api.bench_cost import bench_step
    from fewstep.distill.config_files import load_config

    check_json(file)
    found = bench_step(load_config(config, overrides or []), rounds)
    text = (
        f"A cycle of updates (training steps: {found['steps_a_cycle']}) takes {_ms(found['seconds_full'])}, its "
        f"{found['evaluations_a_cycle']} network evaluations alone {_ms(found['seconds_bare'])}: "
        f"{found['ratio']:.2f} times as long (batch {found['batch']}, {found['device']}, medians of {rounds} rounds)."
    )
    _show(found, text, file)


@app.command(epilog="Example: fewstep bench sampler fashion --solver unipc_2 --steps 10")
def sampler(
    model_name: ModelName,
    solver: Annotated[str, typer.Option(help="One of fewstep solver list.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=1, help="Number of steps.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 64,
    file: JsonFile = None,
    rounds: Rounds = 15,
    device: Device = "auto",
) -> None:
    """Time a solver's steps against as many calls of the network alone, in turn in one process."""
    from fewstep.api.bench_cost import bench_sampler
    from fewstep.api.models import load
    from fewstep.samplers.plan import SamplingConfig

    check_json(file)
    found = bench_sampler(load(model_name, device), SamplingConfig(solver, steps), batch, rounds)
    text = (
        f"Sampling with {solver} (steps: {steps}) takes {_ms(found['seconds_full'])}, its {found['evaluations']} "
        f"network evaluations alone {_ms(found['seconds_bare'])}: {found['ratio']:.2f} times as long, or "
        f"{found['ratio_same_mode']:.2f} times if these are in inference mode, as sampling is (batch {batch}, "
        f"{found['device']}, medians of {rounds} rounds)."
    )
    _show(found, text, file)


@app.command(cls=CommandWithSettings, epilog="Example: fewstep bench memory configs/fashion/demo.yaml")
def memory(config: ConfigFile, overrides: Overrides = None, file: JsonFile = None) -> None:
    """Measure the memory of weights and the peak of training, with adapters (if configured) and with copies."""
    from fewstep.api.bench_cost import bench_memory
    from fewstep.distill.config_files import load_config

    check_json(file)
    found = bench_memory(load_config(config, overrides or []))
    lines = [
        f"With {mode}: {found[mode]['parameters'] / GIB:.3f} GiB of weights, {found[mode]['peak'] / GIB:.3f} GiB at "
        f"the peak of training ({found['device']})."
        for mode in ("adapters", "copies")
        if mode in found
    ]
    _show(found, "\n".join(lines), file)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f} ms"


def _show(result: dict[str, Any], text: str, file: Path | None) -> None:
    """Prints ``text`` and writes all of ``result``; to standard output the result alone."""
    if file is None or str(file) != "-":
        print_text(text)
    if file is not None:
        write_json(result, file)
