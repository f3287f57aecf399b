"""A run and its folder: builds everything from a config, trains, records, checkpoints, resumes, replays."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fewstep.distill import checkpoint
from fewstep.distill.config import Config, StageConfig, dump_config, load_config, objective_module
from fewstep.distill.data import Images, Labels, Prompts, Source, Stored, read_folder, read_idx, read_stored
from fewstep.distill.draws import Draws
from fewstep.distill.health import Probe
from fewstep.distill.loop import ALONE, Loop, World
from fewstep.distill.record import Record, environment
from fewstep.distill.roles import Role, Roles
from fewstep.distill.stage import MatchingConfig, enter_stage, learning_rate
from fewstep.distill.update import Objective
from fewstep.errors import UserError
from fewstep.models.adapters import AdapterView, checkpoint_gradients
from fewstep.models.attention import set_attention
from fewstep.models.denoiser import Denoiser, routed
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.quantized import quantize
from fewstep.models.store import FewStep, ModelConfig, load_model, pipeline_of, save_model, share_network, write_text

PRECISIONS = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16, "nf4": torch.bfloat16,
}  # of weights; the quantized ones: of what is not a linear layer  # fmt: skip


class Interrupted(Exception):
    """Ctrl-C or a termination signal: the checkpoint is written, the command ends with exit code 130."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


Progress = Callable[["Run", dict[str, float]], None]


class Validator(Protocol):
    """Looks at the student (its averaged weights in place): pictures for ``samples/``, and a number, lower is better,
    or None where nothing can be scored."""

    def __call__(self, student: Denoiser, config: ModelConfig, step: int) -> float | None: ...


@dataclass
class Run:
    """A run folder in use. Make one with ``create`` or ``reopen``, then ``train``. ``step`` counts those done so far,
    over all stages, ``evaluations`` the samples that networks were evaluated at for them, in all processes."""

    config: Config
    folder: Path
    device: torch.device
    world: World = ALONE
    origin: ModelConfig = field(init=False)
    roles: Roles = field(init=False)
    objective: Objective = field(init=False)
    loop: Loop = field(init=False)
    few_step: FewStep | None = field(init=False, default=None)
    prompts: EncodedPrompts | None = field(init=False, default=None)
    pipeline: PipelineFolder | None = field(init=False, default=None)
    stage: int = field(init=False, default=-1)
    step: int = field(init=False, default=0)
    best: dict[str, float] = field(init=False, default_factory=dict)
    seconds: float = field(init=False, default=0.0)
    evaluations: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._origins: dict[str, Role] = {}
        if self.config.teacher is not None:
            taps = dict.fromkeys(tap for stage in self.config.stages for tap in stage.objective.taps)
            model = load_model(self.config.teacher, tuple(taps), self.config.size, PRECISIONS[self.config.weights])
            self.origin = model.config
            set_attention(model.denoiser.backbone, self.config.attention, self.device)
            if self.config.weights in ("int8", "nf4"):
                quantize(model.denoiser.backbone, self.config.weights)
            if self.config.data.kind == "prompts":
                self.pipeline = pipeline_of(model)
            if self.config.adapters is not None:
                lora = share_network(model.denoiser, **dict(self.config.adapters))
                self.origin = model.config.model_copy(update={"base": self.config.teacher, "lora": lora})
            if self.config.gradient_checkpointing:
                checkpoint_gradients(model.denoiser.backbone)
            self._origins["teacher"] = Role(model.denoiser.to(self.device))
        else:
            assert self.config.model is not None
            self.origin = self.config.model
            with torch.random.fork_rng():  # torch's initialisers read the global generator
                torch.manual_seed(self.config.seed)
                self._origins["model"] = Role(self.origin.build().to(self.device))
        self._sources = self._make_sources()
        rows = self._sources["data"](Draws(0, 0, "health", 0), self.config.health.conditions).condition
        self._probe = Probe(rows.to(self.device), self.config.health, self.origin, self.device, self.config.batch)
        self.enter(0)

    @staticmethod
    def create(config: Config, device: torch.device, world: World = ALONE) -> Run:
        """Starts a fresh run folder. Raises ``UserError`` if the folder already holds something."""
        folder = Path(config.out)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{folder} is not empty. Continue it with --resume {folder}, or choose another folder with out=…"
            )
        run = Run(config, folder, device, world)
        if world.rank == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"Cannot make the run folder {folder}: {error}.") from error
            write_text(dump_config(config), folder / "config.yaml")
            write_text(json.dumps(environment(device), indent=2) + "\n", folder / "environment.json")
        return run

    @staticmethod
    def reopen(folder: str | Path, device: torch.device, world: World = ALONE, before: int | None = None) -> Run:
        """Opens a run at its last checkpoint (or the last one at or before step ``before``).

        Raises ``UserError`` if the folder is no run or a checkpoint is damaged.
        """
        folder = Path(folder)
        run = Run(run_config(folder), folder, device, world)
        saved = [c for c in checkpoint.checkpoints(folder / "checkpoints") if before is None or step_of(c) <= before]
        if saved:
            run._restore(saved[-1])
        return run

    # --- building -------------------------------------------------------------------------------------------------

    def _make_sources(self) -> dict[str, Source]:
        data = self.config.data
        if data.kind == "labels" and not self.origin.classes and self.origin.base is not None:
            raise UserError("This teacher takes prompts: fewstep encode them, then data.kind=prompts data.path=FOLDER.")
        if data.kind == "labels":
            return {"data": Labels(self.origin.classes, self.origin.shape)}
        assert data.path is not None
        if data.kind == "prompts":
            assert self.pipeline is not None
            self.prompts = EncodedPrompts(Path(data.path))
            self.prompts.check(self.pipeline)
            sizes = [self.pipeline.family.shape(*size) for size in data.sizes]
            return {"data": Prompts(self.prompts, sizes or [self.origin.shape])}
        source: Images | Stored
        if data.kind == "tensors":
            source = read_stored(Path(data.path), self.origin.classes)
        elif data.kind == "folder":
            source = Images(*read_folder(data.path, self.origin.shape), self.origin.classes)
        else:
            source = Images(*read_idx(data.path, data.split), self.origin.classes)
        if source.shape != self.origin.shape or int(source.labels.max()) >= self.origin.classes:
            raise UserError(
                f"The images in {data.path} are {list(source.shape)} with labels up to {int(source.labels.max())}; "
                f"the model is for {list(self.origin.shape)} and {self.origin.classes} classes."
            )
        return {"data": source}

    def enter(self, stage: int) -> None:
        """Builds roles, objective and loop of a stage, from the roles of the one before."""
        settings: StageConfig = self.config.stages[stage]
        wanted = settings.objective
        module = objective_module(wanted.name)
        before = dict(self.roles) if self.stage >= 0 else self._origins
        probe = self._sources["data"](Draws(0, 0, "probe", 0), 1).to(self.device)
        network = before["teacher" if "teacher" in before else "model"].module
        assert isinstance(network, Denoiser)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            networks = wanted.networks(network, probe.shape, probe.condition)
        for name in networks:
            if name in settings.roles and settings.roles[name].init not in ("new", "keep"):
                raise UserError(
                    f"stages.{stage}.roles.{name}.init = {settings.roles[name].init!r}: the objective {wanted.name!r} "
                    "makes this network itself; use init: new."
                )
        if self.stage >= 0:
            self.roles.fetch()  # so that copies are made on the device
        roles = enter_stage(before, settings.roles, settings.freeze, networks)
        if missing := wanted.needs - set(roles):
            raise UserError(
                f"stages.{stage}: the objective {wanted.name!r} needs the roles {sorted(wanted.needs)}, "
                f"but {sorted(missing)} is not there (under roles: or freeze:; known here: {', '.join(roles)})."
            )
        if missing := wanted.tensors - set(probe):
            raise UserError(
                f"stages.{stage}: the objective {wanted.name!r} needs {sorted(missing)} with each condition, and "
                f"data.kind={self.config.data.kind} brings {sorted(probe) or 'none'}; use real images "
                "(data.kind=idx or folder, data.path=FOLDER) or a file of samples (data.kind=tensors data.path=FILE; "
                "fewstep pairs makes one)."
            )
        self.stage = stage
        self.roles = Roles(roles, PRECISIONS[self.config.precision])
        self.objective = module.build(wanted, self.roles)
        if self.config.offload:
            self.roles.offload(roles.keys() - settings.roles.keys() - dict(self.objective.experts).keys(), self.device)
        unknown = {role for update in self.objective.updates for role in update.roles} - set(settings.roles)
        if unknown:
            raise UserError(
                f"stages.{stage}.roles: {sorted(unknown)} is trained by the objective, so it needs a learning rate."
            )
        self.few_step = self.objective.few_step or (self.few_step if stage else self.origin.few_step)
        first, last = self._ends[stage] - settings.steps, self._ends[stage]
        for name, role_config in settings.roles.items():
            updates = sum(u.due.count(first, last) for u in self.objective.updates if name in u.roles)
            self.roles[name].rate = learning_rate(role_config, updates)
        self.loop = Loop(
            self.roles,
            self.objective,
            self._sources,
            self.config.batch,
            self.config.accumulate,
            settings.clip,
            self.config.seed,
            self.device,
            self.world,
        )

    @property
    def student_config(self) -> ModelConfig:
        """The config under which the student is saved: the teacher's, and how the objective samples it."""
        boundaries = tuple(lowest for _, lowest in self.objective.experts)
        routed = boundaries if len(boundaries) > 1 else None
        backbone = self.origin.backbone | self.objective.backbone
        whole = not isinstance(self.roles.denoiser("student").backbone, AdapterView)
        return self.origin.model_copy(
            update={
                "few_step": self.few_step, "boundaries": routed, "backbone": backbone,
                "lora": None if whole else self.origin.lora,
            }
        )  # fmt: skip

    @property
    def generator(self) -> Denoiser:
        """What is sampled and saved: the student, or experts by noise level with the student among them."""
        experts = [self.roles.denoiser(role) for role, _ in self.objective.experts]
        return experts[0] if len(experts) == 1 else routed(experts, [low for _, low in self.objective.experts])

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, validate: Validator | None = None, progress: Progress | None = None) -> None:
        """Trains to the end of the last stage, from wherever the run stands.

        Raises ``Interrupted`` after writing a checkpoint if a signal asked to stop.
        """
        started = time.monotonic() - self.seconds
        ends = self._ends
        latest: dict[str, Tensor] = {}  # since the last line of the log: not every update happens at a logged step
        drift: dict[str, float] = {}
        record = Record(self.folder, self.config.tensorboard) if self.world.rank == 0 else _nothing
        with stop_requests() as stop:
            while self.step < ends[-1]:
                latest |= self._one_step()
                if self.world.rank == 0 and self._due(self.config.health.every):
                    drift = self._drift()
                self.seconds = time.monotonic() - started
                values: dict[str, float] = {}
                if self.step % self.config.log_every == 0 or self.step == ends[-1]:
                    values = numbers(latest) | drift
                    latest, drift = {}, {}
                    record(self.step, self._spent | {"stage": self.stage, **values})
                if progress is not None:
                    progress(self, values)
                last = self.step == ends[-1]
                if validate is not None and (last or self._due(self.config.validation.every)):
                    value = self._validate(validate)
                    if value is not None:
                        record(self.step, self._spent | {"validation": value})
                if last or stop.requested or self._due(self.config.checkpoint.every) or self.step == ends[self.stage]:
                    self.save()
                if stop.requested and not last:
                    raise Interrupted(f"stopped at step {self.step} of {ends[-1]}", self.folder)
        self._save_student()

    def advance(self, step: int) -> dict[str, float]:
        """Goes on to ``step`` without recording anything; returns the numbers of the last step."""
        metrics: dict[str, Tensor] = {}
        while self.step < step:
            metrics = self._one_step()
        return numbers(metrics)

    @property
    def _ends(self) -> list[int]:
        """The step at which each stage ends."""
        return [sum(stage.steps for stage in self.config.stages[: i + 1]) for i in range(len(self.config.stages))]

    @property
    def _spent(self) -> dict[str, float]:
        return {"seconds": round(self.seconds, 3), "evaluations": self.evaluations}

    def _one_step(self) -> dict[str, Tensor]:
        if self.step >= self._ends[self.stage]:
            self.enter(self.stage + 1)
            self.best = {}  # of another method or generator, not to be compared
        before = self.roles.evaluations
        metrics = self.loop.step(self.step)
        self.evaluations += (self.roles.evaluations - before) * self.world.size  # as if all did alike
        self.step += 1
        return metrics

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _drift(self) -> dict[str, float]:
        """How samples of the averaged student differ from the teacher's; nothing where there is no teacher."""
        if "teacher" not in self._origins:
            return {}
        objective = self.config.stages[self.stage].objective
        scale = objective.guidance if isinstance(objective, MatchingConfig) else 1.0
        with self.roles["student"].averaged(), torch.no_grad(), self.roles.resident("teacher") as teacher:
            return self._probe(self.generator, self.few_step, teacher, scale)

    def _validate(self, validate: Validator) -> float | None:
        student = self.roles["student"]
        with student.averaged(), torch.no_grad():
            value = validate(self.generator, self.student_config, self.step)
        if value is not None and value < self.best.get("value", float("inf")):
            self.best = {"value": value, "step": self.step}
            self._write_model(self.folder / "best")
        return value

    def _save_student(self) -> None:
        """``student/``: the best validated student, or the last where nothing was validated."""
        if self.world.rank:
            return
        if self.best:
            shutil.copytree(self.folder / "best", self.folder / "student", dirs_exist_ok=True)
        else:
            self._write_model(self.folder / "student")

    def _write_model(self, folder: Path) -> None:
        if self.world.rank == 0:
            with self.roles["student"].averaged():
                save_model(self.generator, self.student_config, folder)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes a checkpoint of every role that training made, and of the objective's own tensors."""
        if self.world.rank:
            return
        tensors: dict[str, Tensor] = {}
        for name, role in self.roles.items():
            if name not in self._origins:
                tensors |= checkpoint.role_tensors(name, role)
        tensors |= {f"objective/{name}": value for name, value in self.objective.state.items()}
        spent = {"seconds": self.seconds, "evaluations": self.evaluations}
        state = {"stage": self.stage, **spent, "best": self.best}
        checkpoint.write_checkpoint(self.folder / "checkpoints", self.step, tensors, state, self.config.checkpoint.keep)

    def _restore(self, folder: Path) -> None:
        tensors, state = checkpoint.read_checkpoint(folder)
        try:
            for stage in range(1, state["stage"] + 1):
                self.enter(stage)
            for name, role in self.roles.items():
                if name not in self._origins:
                    checkpoint.restore_role(name, role, tensors)
            for name, value in self.objective.state.items():
                value.copy_(tensors[f"objective/{name}"])
            self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
            self.evaluations = state["evaluations"]
        except KeyError as error:
            raise UserError(
                f"{folder} lacks {error}: another version of fewstep wrote it. Train anew, in another folder."
            ) from error


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The metrics as numbers, without the diagnostics that nothing fell to (no sample in a range of times)."""
    values = {name: value.item() for name, value in metrics.items()}
    return {name: value for name, value in values.items() if not (name.startswith("health/") and math.isnan(value))}


def _nothing(step: int, values: Mapping[str, float]) -> None:
    """What the other processes of a run record."""


def run_config(folder: str | Path) -> Config:
    """The resolved config of a run folder. Raises ``UserError`` if the folder is none."""
    file = Path(folder) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    return load_config(file)


def step_of(folder: Path) -> int:
    """The step of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def stop_requests() -> Iterator[_Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request; a second one acts at once."""
    stop = _Stop()

    def request(number: int, frame: object) -> None:
        stop.requested = True
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, request)
    except ValueError:  # not in the main thread: signals belong to somebody else
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def replay_step(folder: Path, step: int, device: torch.device) -> tuple[dict[str, float], dict[str, float]]:
    """A logged step's own numbers as recorded and as computed again from the checkpoint before it.

    Raises ``UserError`` if the step was not logged.
    """
    run = Run.reopen(folder, device, before=step - 1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = {line["step"]: line for line in lines if "validation" not in line}
    if step not in logged:
        raise UserError(
            f"Step {step} was not logged; logged are every {run.config.log_every} up to {max(logged, default=0)}."
        )
    computed = run.advance(step)
    return {name: logged[step][name] for name in computed if name in logged[step]}, computed
