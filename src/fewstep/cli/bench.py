"""``fewstep bench``: methods at one budget of evaluations, and what training and sampling cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep.cli.options import (
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
Rounds = Annotated[int, typer.Option(min=2, help="Paired rounds; medians are reported.")]


@app.command(epilog="Example: fewstep bench objectives configs/fashion/objectives.yaml seeds=[0]")
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


@app.command(epilog="Example: fewstep bench step configs/fashion/demo.yaml")
def step(config: ConfigFile, overrides: Overrides = None, file: JsonFile = None, rounds: Rounds = 15) -> None:
    """Time a full update against its bare network evaluations, paired in one process."""
    from fewstep.api.bench_cost import bench_step
    from fewstep.distill.config_files import load_config

    check_json(file)
    _print(bench_step(load_config(config, overrides or []), rounds), file)


@app.command(epilog="Example: fewstep bench sampler fashion --solver unipc_2 --steps 10")
def sampler(
    model_name: ModelName,
    solver: Annotated[str, typer.Option(help="One of fewstep solver list.")] = "dpmpp_2m",
    steps: Annotated[int, typer.Option(min=1, help="Steps.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Samples per batch.")] = 64,
    file: JsonFile = None,
    rounds: Rounds = 15,
    device: Device = "auto",
) -> None:
    """Time a solver's steps against as many bare calls of the network, paired in one process."""
    from fewstep.api.bench_cost import bench_sampler
    from fewstep.api.models import load
    from fewstep.samplers.plan import SamplingConfig

    check_json(file)
    _print(bench_sampler(load(model_name, device), SamplingConfig(solver, steps), batch, rounds), file)


@app.command(epilog="Example: fewstep bench memory configs/fashion/demo.yaml")
def memory(config: ConfigFile, overrides: Overrides = None, file: JsonFile = None) -> None:
    """Measure bytes of weights and the peak of training, with adapters (where the config has them) and with copies."""
    from fewstep.api.bench_cost import bench_memory
    from fewstep.distill.config_files import load_config

    check_json(file)
    _print(bench_memory(load_config(config, overrides or [])), file)


def _print(result: dict[str, Any], file: Path | None) -> None:
    if file is None or str(file) != "-":
        for name, value in result.items():
            print_text(f"{name}: {value}")
    if file is not None:
        write_json(result, file)
