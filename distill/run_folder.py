"""Run folders: config, environment, metrics, checkpoints, the best and the final student; resuming and replaying."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL.Image import Image

from fewstep.core.environment import environment
from fewstep.core.errors import UserError
from fewstep.core.files import atomic_folder, reason_of, remove_leftovers, write_text
from fewstep.core.image_grid import save_image
from fewstep.core.json_files import read_json_lines
from fewstep.core.registry import Kind, is_dotted, require_imported
from fewstep.distill.build import TrainingInputs, build_inputs
from fewstep.distill.callback import Callback, Interrupted, Validator
from fewstep.distill.checkpoint import StoredTensors, checkpoints, delete_old, read_newest, step_of, write_checkpoint
from fewstep.distill.checkpoint_student import student_record
from fewstep.distill.config import Config
from fewstep.distill.config_files import dump_config, parse_config, read_settings, written_settings
from fewstep.distill.loop import LostUpdate
from fewstep.distill.metrics_logger import append_line, forget_after
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.resume import changes, check_changes, check_same, flat_settings, settings_at, with_current_keys
from fewstep.distill.sharding import whole
from fewstep.distill.trackers import Trackers, check_installed
from fewstep.distill.trainer import Trainer
from fewstep.models.saving import require_sound, save_weights

BEFORE_TRAINING = {"config.yaml", "environment.json", "trackers.json", "tensorboard", "wandb"}  # before the first step


class RunFolder(Callback):
    """The folder of a run and its ``trainer``, whose events it records. Only rank 0 writes."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self.folder = folder
        self.trainer = trainer
        self._writes = trainer.world.rank == 0
        self._trackers = Trackers(warn=lambda text: trainer.notify("on_note", text))
        self._lock = FileLock(folder / ".lock")
        self._origin: dict[str, Any] = {  # what checkpoints are bound to
            "config": trainer.config.model_dump(mode="json"),
            "teacher_sha256": trainer.inputs.teacher_sha256,
            "networks_sha256": trainer.inputs.networks_sha256,
            "class_names": list(trainer.inputs.model_config.class_names or ()),
            "processes": trainer.world.size,
        }
        self._resumed: dict[str, Any] | None = None  # the line for resumes.jsonl
        self._notes: list[str] = []
        self._known: list[Path] = []  # the checkpoints when it was opened, and its own

    @staticmethod
    def create(
        config: Config, device: torch.device, world: World = SINGLE_PROCESS, inputs: TrainingInputs | None = None
    ) -> RunFolder:
        """Starts a new run. Raises ``UserError`` if the folder contains anything but a run without a step."""
        if config.out is None:
            raise UserError("The key 'out', the run folder, is missing: set out=runs/NAME.")
        folder = Path(config.out)
        world.once(lambda: _require_unused(folder))
        world.once(lambda: check_installed(config.trackers))
        with world.together():
            run = RunFolder(folder, Trainer(config, inputs or build_inputs(config, device, world=world), device, world))
        run._notes += run.trainer.inputs.notes
        world.once(run._start)
        run._lock.release()
        return run

    def _start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot create the run folder {self.folder}: {error}.") from error
        self._claim()
        _require_unused(self.folder)  # another run may have begun to write here meanwhile
        write_text(json.dumps(environment(self.trainer.device), indent=2) + "\n", self.folder / "environment.json")
        write_text(dump_config(self.trainer.config), self.folder / "config.yaml")

    @staticmethod
    def reopen(
        folder: str | Path, device: torch.device, world: World = SINGLE_PROCESS, inputs: TrainingInputs | None = None,
        *, before: int | None = None, config: Config | None = None,
    ) -> RunFolder:  # fmt: skip
        """Opens a run at its newest checkpoint that is not damaged, or at the newest one at or before ``before``.

        ``config`` replaces the run's own. Raises ``UserError`` if the folder is not a run, if all checkpoints are
        damaged, if they belong to another teacher or to settings that a run may not change, and, without ``before``, if
        another process is training in the folder.
        """
        folder, config = Path(folder), config or run_config(folder)
        resumed = world.once(lambda: bool(checkpoints(folder / "checkpoints", before)))
        with world.together():
            inputs = inputs or build_inputs(config, device, world=world, resumed=resumed)
            run = RunFolder(folder, Trainer(config, inputs, device, world))
        if before is None:
            world.once(run._claim)  # else another process may delete what is read here
        try:
            run._known = checkpoints(folder / "checkpoints")
            if world.once(lambda: checkpoints(folder / "checkpoints", before)):
                found = read_newest(folder / "checkpoints", before, world)
                with world.together():
                    run._restore(*found)
        finally:
            run._lock.release()
        return run

    def train(self, validate: Validator | None = None, callbacks: Sequence[Callback] = ()) -> None:
        """Trains to the end. Raises ``Interrupted`` as ``Trainer.train`` does, and ``UserError`` if another process is
        training in this folder."""
        trainer = self.trainer
        try:
            trainer.world.once(self._begin)
            if trainer.best and (reason := trainer.world.once(self._damage_of_best)) is not None:
                trainer.best = {}
                self._notes.append(f"{reason} Of the students validated from here on, the best is kept.")
            trainer.validate = validate
            trainer.callbacks = [self, *callbacks]
            for note in self._notes:
                trainer.notify("on_note", note)
            trainer.train()
        except (Interrupted, KeyboardInterrupt) as stop:
            text = str(stop) or f"stopped within step {trainer.step + 1}: all after the last checkpoint is lost"
            raise Interrupted(text, folder=self.folder) from None
        finally:
            self._trackers.finish()
            self._lock.release()

    def _begin(self) -> None:
        """Claims the folder, records what resuming changes, and starts trackers."""
        self._claim()
        if checkpoints(self.folder / "checkpoints") != self._known:
            raise UserError(f"Another process has trained in {self.folder} meanwhile: resume it, or set another out.")
        remove_leftovers(self.folder)
        remove_leftovers(self.folder / "checkpoints")
        for images in ("samples", "previews"):
            remove_leftovers(self.folder / images, "step-*.part")
        delete_old(self.folder / "checkpoints", self.trainer.step, self.trainer.config.checkpoint.keep)
        for name in ("metrics.jsonl", "lost_updates.jsonl"):
            forget_after(self.folder / name, self.trainer.step)
        write_text(dump_config(self.trainer.config), self.folder / "config.yaml")
        if self._resumed is not None:
            append_line(self.folder / "resumes.jsonl", self._resumed)
        config, step = self.trainer.config, self.trainer.step
        if step < config.steps:
            self._trackers.start(config.trackers, self.folder, step, dict(flat_settings(self._origin["config"])))

    def _damage_of_best(self) -> str | None:
        """What is wrong with ``best/``."""
        try:
            require_sound(self.folder / "best")
        except UserError as error:
            return str(error)
        return None

    def _claim(self) -> None:
        """Locks the folder until training ends; the system frees the lock of a killed process."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"Another process is training in {self.folder}: wait for it, or stop it.") from None
        except (NotImplementedError, OSError) as error:
            note = f"{self.folder} cannot be locked ({error}): start no second training in it."
            self._notes += [] if note in self._notes else [note]

    # --- events -------------------------------------------------------------------------------------------------------

    def on_log(self, trainer: Trainer, values: dict[str, float]) -> None:
        self._record(trainer, {"stage": trainer.stage, **values})

    def on_lost_update(self, trainer: Trainer, lost: LostUpdate) -> None:
        if self._writes:
            append_line(self.folder / "lost_updates.jsonl", asdict(lost))

    def on_validation(self, trainer: Trainer, value: float) -> None:
        if trainer.best["step"] == trainer.step:
            self._write_student(trainer, "best")
        self._record(trainer, {"validation": value})

    def on_preview(self, trainer: Trainer, image: Image) -> None:
        if self._writes:
            save_image(image, self.folder / "previews" / f"step-{trainer.step:07d}.png")
            self._trackers.log_image(trainer.step, "previews", image)

    def on_checkpoint(self, trainer: Trainer) -> None:
        tensors, state = trainer.state()
        folder, keep = self.folder / "checkpoints", trainer.config.checkpoint.keep
        state |= {"run": self._origin, "student": student_record(trainer)}
        write_checkpoint(folder, trainer.step, tensors, state, keep, trainer.world)
        self._known = checkpoints(folder)

    def on_end(self, trainer: Trainer) -> None:
        """Writes ``student/``: the best student in validation, or the last one if nothing was validated."""
        if trainer.best and self._writes:
            with atomic_folder(self.folder / "student") as partial:
                shutil.copytree(self.folder / "best", partial, dirs_exist_ok=True)
        elif not trainer.best:
            self._write_student(trainer, "student")

    def _record(self, trainer: Trainer, values: dict[str, float]) -> None:
        if self._writes:
            cost = {"seconds": round(trainer.seconds, 3), "evaluations": trainer.evaluations}
            append_line(self.folder / "metrics.jsonl", {"step": trainer.step, **cost, **values})
            self._trackers.log(trainer.step, cost | values)

    def _write_student(self, trainer: Trainer, name: str) -> None:
        with trainer.roles["student"].averaged():
            tensors = whole(trainer.generator.backbone.state_dict(), keep=self._writes)
            if self._writes:
                with atomic_folder(self.folder / name) as partial:
                    save_weights(tensors, trainer.student_config, partial)

    # --- resuming -----------------------------------------------------------------------------------------------------

    def _restore(self, checkpoint: Path, tensors: StoredTensors, state: dict[str, Any], damaged: Sequence[str]) -> None:
        trainer = self.trainer
        self._notes += [f"{text} Training continues from step {step_of(checkpoint)}." for text in damaged[:1]]
        try:
            self._check_origin(state)
            trainer.load_state(tensors, state)
        except KeyError as error:
            raise UserError(
                f"{checkpoint} has no {error}: it is from another version of fewstep. Train again in another folder."
            ) from error
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UserError(f"{checkpoint / 'state.json'} does not fit this run: {reason_of(error)}.") from error
        except UserError as error:
            raise UserError(f"{checkpoint}: {error}") from error

    def _check_origin(self, state: Mapping[str, Any]) -> None:
        """Raises ``UserError`` if a checkpoint belongs to another run; records what resuming changes."""
        before = state["run"] | {"config": with_current_keys(state["run"]["config"])}
        changed = changes(before["config"], self._origin["config"])
        check_changes(changed, state["stage"], state["step"], self.trainer.stage_ends)
        check_same(before, self._origin)
        if before["processes"] != self._origin["processes"]:
            self._notes.append(
                f"The run had {_processes(before['processes'])} and has {self._origin['processes']} now: they share "
                "the same micro-batches, so results differ by rounding alone."
            )
        self._resumed = {
            "step": state["step"], "processes": self._origin["processes"], "version": version("fewstep"),
            "changed": changed, "before": before["config"],
        }  # fmt: skip


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _require_unused(folder: Path) -> None:
    """Raises ``UserError`` if a folder contains more than what is there before a run's first step."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    names = {name for name in names if name != ".lock" and not name.endswith(".part")}
    if names and not {"environment.json"} <= names <= BEFORE_TRAINING:
        raise UserError(
            f"{folder} is not empty. Resume it with --resume {shlex.quote(str(folder))}, or set another out=FOLDER."
        )


def run_config(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run folder, with ``key=value`` overrides. Raises ``UserError`` if it is not one, or
    names a module of the user's own that has not been imported: a folder may come from somebody else, and opening it
    runs none of their code."""
    settings = read_settings(_config_file(folder))[0]
    for kind, name in _named_modules(settings):
        if is_dotted(str(name)):
            require_imported(name, kind)
    raw, file, overridden = read_settings(_config_file(folder), overrides)
    config = parse_config(raw if "tensorboard" in overridden else with_current_keys(raw), file, overridden)
    if overrides and config.out != settings.get("out"):
        raise UserError(
            f"out = {config.out}: a resumed run stays in {folder}, so leave out= away. To continue elsewhere, copy the "
            "folder and resume the copy."
        )
    return config


def _named_modules(settings: dict[str, Any]) -> Iterator[tuple[Kind, Any]]:
    """The settings that may be dotted names."""

    def get(*keys: str) -> Any:
        node: Any = settings
        for key in keys:
            node = node.get(key) if isinstance(node, dict) else None
        return node

    yield "teacher", get("teacher")
    yield "backbone", get("model", "backbone", "name")
    yield "teacher", get("model_weights")
    for name in settings["networks"] if isinstance(settings.get("networks"), dict) else ():
        yield "teacher", get("networks", name, "checkpoint")
        yield "backbone", get("networks", name, "backbone", "name")
    yield "data", get("data", "kind")
    yield "solver", get("validation", "solver")
    for stage in settings["stages"] if isinstance(settings.get("stages"), list) else ():
        objective = stage.get("objective") if isinstance(stage, dict) else None
        yield "objective", objective.get("name") if isinstance(objective, dict) else objective


def run_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a run folder as written, without importing the modules they name. Raises ``UserError`` if it is
    not one."""
    return written_settings(_config_file(folder))


def _config_file(folder: str | Path) -> Path:
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    return file


def teacher_of(folder: Path) -> str | None:
    """The teacher of a run folder; None for a pretraining run and for a folder that is not a run."""
    return run_settings(folder).get("teacher") if (folder / "config.yaml").is_file() else None


def replay_step(folder: Path, step: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """The losses and gradient norms of the log line of ``step``, as recorded and as recomputed.

    A line has the latest ones since the line before, so these steps are repeated, from a checkpoint before them.

    Raises ``UserError`` if the step was not logged, or the run has changed its settings since and a checkpoint between
    is missing.
    """
    lines, _ = read_json_lines(folder / "metrics.jsonl")
    logged = {line["step"]: line for line in lines if "validation" not in line}
    if step not in logged:
        near = sorted(sorted(logged, key=lambda other: abs(other - step))[:3])
        raise UserError(f"Step {step} was not logged; near it were {', '.join(map(str, near)) or 'none'}.")
    before = max((other for other in logged if other < step), default=0)
    first = max((step_of(path) for path in checkpoints(folder / "checkpoints", before)), default=0)
    settings = dict(settings_at(folder, run_config(folder).model_dump(mode="json"), first, step))
    if device.type != "cuda":
        settings["cuda_graphs"] = False
    config = parse_config(settings, str(folder / "config.yaml"))
    trainer = RunFolder.reopen(folder, device, before=before, config=config).trainer
    trainer.advance(before)
    computed = {name: value for name, value in trainer.advance(step).items() if name in logged[step]}
    return {name: logged[step][name] for name in computed}, computed
