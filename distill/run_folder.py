"""Run folders: config, environment, metrics, checkpoints, the best and the final student; resuming and replaying."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fewstep.core.environment import environment
from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.core.registry import Kind, is_dotted, require_imported
from fewstep.distill.build import TrainingInputs, build_inputs
from fewstep.distill.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from fewstep.distill.config import Config
from fewstep.distill.config_files import dump_config, load_config, read_settings
from fewstep.distill.loop import LostUpdate
from fewstep.distill.metrics_logger import MetricsLogger, append_line
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.trainer import Callback, Interrupted, Trainer, Validator
from fewstep.models.saving import save_model


class RunFolder(Callback):
    """The folder of a run and its ``trainer``, whose events it records. Only rank 0 writes."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder = folder
        self.trainer = trainer
        self._writes = trainer.world.rank == 0
        self._log: MetricsLogger | None = None

    @staticmethod
    def create(
        config: Config, device: torch.device, world: World = SINGLE_PROCESS, inputs: TrainingInputs | None = None
    ) -> RunFolder:
        """Starts a new run. Raises ``UserError`` if the folder is not empty."""
        if config.out is None:
            raise UserError("The key 'out', the run folder, is missing: set out=runs/NAME.")
        folder = Path(config.out)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty. Resume it with --resume {folder}, or set another out=FOLDER.")
        run = RunFolder(folder, Trainer(config, inputs or build_inputs(config, device), device, world))
        if run._writes:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"Cannot create the run folder {folder}: {error}.") from error
            write_text(dump_config(config), folder / "config.yaml")
            write_text(json.dumps(environment(device), indent=2) + "\n", folder / "environment.json")
        return run

    @staticmethod
    def reopen(
        folder: str | Path, device: torch.device, world: World = SINGLE_PROCESS, before: int | None = None,
        inputs: TrainingInputs | None = None,
    ) -> RunFolder:  # fmt: skip
        """Opens a run at its last checkpoint, or at the last one at or before step ``before``.

        Raises ``UserError`` if the folder is not a run or the checkpoint is damaged.
        """
        folder, config = Path(folder), run_config(folder)
        run = RunFolder(folder, Trainer(config, inputs or build_inputs(config, device), device, world))
        saved = [c for c in checkpoints(folder / "checkpoints") if before is None or step_of(c) <= before]
        if saved:
            run._restore(saved[-1])
        return run

    def train(self, validate: Validator | None = None, callbacks: Sequence[Callback] = ()) -> None:
        """Trains to the end. Raises ``Interrupted`` as ``Trainer.train`` does."""
        self._log = MetricsLogger(self.folder, self.trainer.config.tensorboard) if self._writes else None
        self.trainer.validate = validate
        self.trainer.callbacks = [self, *callbacks]
        try:
            self.trainer.train()
        except Interrupted as stop:
            stop.folder = self.folder
            raise

    # --- events -------------------------------------------------------------------------------------------------------

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        self._record(trainer, {"stage": trainer.stage, **values})

    def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
        if self._log is not None:
            append_line(self.folder / "lost_updates.jsonl", asdict(lost))

    def on_validation(self, trainer: Trainer, value: float) -> None:
        if trainer.best["step"] == trainer.step:
            self._write_student(trainer, "best")
        self._record(trainer, {"validation": value})

    def on_checkpoint(self, trainer: Trainer) -> None:
        if self._writes:
            tensors, state = trainer.state()
            keep = trainer.config.checkpoint.keep
            write_checkpoint(self.folder / "checkpoints", trainer.step, tensors, state, keep)

    def on_end(self, trainer: Trainer) -> None:
        """Writes ``student/``: the best student in validation, or the last one if nothing was validated."""
        if self._writes and trainer.best:
            shutil.copytree(self.folder / "best", self.folder / "student", dirs_exist_ok=True)
        else:
            self._write_student(trainer, "student")

    def _record(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._log is not None:
            cost = {"seconds": round(trainer.seconds, 3), "evaluations": trainer.evaluations}
            self._log(trainer.step, cost | values)

    def _write_student(self, trainer: Trainer, name: str) -> None:
        if self._writes:
            with trainer.roles["student"].averaged():
                save_model(trainer.generator, trainer.student_config, self.folder / name)

    def _restore(self, checkpoint: Path) -> None:
        tensors, state = read_checkpoint(checkpoint)
        try:
            self.trainer.load_state(tensors, state)
        except KeyError as error:
            raise UserError(
                f"{checkpoint} has no {error}: it is from another version of fewstep. Train again in another folder."
            ) from error


def run_config(folder: str | Path) -> Config:
    """The resolved config of a run folder. Raises ``UserError`` if it is not one, or names a module of the user's own
    that has not been imported: a folder may come from somebody else, and opening it runs none of their code."""
    settings = run_settings(folder)
    for kind, name in _named_modules(settings):
        if is_dotted(str(name)):
            require_imported(name, kind)
    return load_config(_config_file(folder))


def _named_modules(settings: dict[str, Any]) -> Iterator[tuple[Kind, Any]]:
    """The settings that may be dotted names."""

    def get(*keys: str) -> Any:
        node: Any = settings
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    yield "teacher", get("teacher")
    yield "backbone", get("model", "backbone", "name")
    yield "data", get("data", "kind")
    yield "solver", get("validation", "solver")
    for stage in settings.get("stages") or []:
        objective = stage.get("objective") if isinstance(stage, dict) else None
        yield "objective", objective.get("name") if isinstance(objective, dict) else objective


def run_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a run folder as written, without importing the modules they name. Raises ``UserError`` if it is
    not one."""
    return read_settings(_config_file(folder))[0]


def _config_file(folder: str | Path) -> Path:
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    return file


def teacher_of(folder: Path) -> str | None:
    """The teacher of a run folder; None for a pretraining run and for a folder that is not a run."""
    return run_settings(folder).get("teacher") if (folder / "config.yaml").is_file() else None


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def replay_step(folder: Path, step: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """The losses and gradient norms of the log line of ``step``, as recorded and as recomputed.

    A line has the latest ones since the line before, so these steps are repeated, from a checkpoint before them.

    Raises ``UserError`` if the step was not logged.
    """
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {line["step"]: line for line in lines if "validation" not in line}
    if step not in logged:
        every = run_config(folder).log_every
        raise UserError(f"Step {step} was not logged; the log has every {every} up to {max(logged, default=0)}.")
    before = max((other for other in logged if other < step), default=0)
    trainer = RunFolder.reopen(folder, device, before=before).trainer
    trainer.advance(before)
    computed = {name: value for name, value in trainer.advance(step).items() if name in logged[step]}
    return {name: logged[step][name] for name in computed}, computed
