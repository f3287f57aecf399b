"""The trainer: runs stages and callbacks. It writes no files; ``run_folder.RunFolder`` does that as a callback."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import stage_checks as checks
from fewstep.distill.agreement import require_same_state
from fewstep.distill.build import DTYPES, TrainingInputs, build_inputs, placed
from fewstep.distill.callback import Callback, Interrupted, Validator
from fewstep.distill.checkpoint import Counters, StoredTensors, restore_role, role_tensors
from fewstep.distill.config import Config
from fewstep.distill.data.batch import Source
from fewstep.distill.health import Probe
from fewstep.distill.loop import MAX_LOST, READ_EVERY, Loop
from fewstep.distill.metrics_logger import to_numbers
from fewstep.distill.nonfinite import require_finite
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.roles import Role, Roles
from fewstep.distill.stage import StageContext, guidance_of, learning_rate, roles_of_stage
from fewstep.distill.stop_requests import END, StopRequests, stop_requests
from fewstep.distill.update import Objective
from fewstep.models.adapters import AdapterView
from fewstep.models.compilation import compile_blocks
from fewstep.models.denoiser import Denoiser, routed
from fewstep.models.loading import Model
from fewstep.models.model_config import FewStep, ModelConfig

T = TypeVar("T")


@dataclass
class Trainer:
    """Trains the stages of ``config`` from ``inputs``.

    ``step`` is the number of finished steps over all stages, ``evaluations`` the number of samples at which they
    evaluated networks, over all processes. ``best`` is the best validation of the current stage.
    """

    config: Config
    inputs: TrainingInputs
    device: torch.device
    world: World = SINGLE_PROCESS
    validate: Validator | None = None
    callbacks: Sequence[Callback] = ()
    roles: Roles = field(init=False)
    objective: Objective = field(init=False)
    loop: Loop = field(init=False)
    few_step: FewStep | None = field(init=False, default=None)
    stage: int = field(init=False, default=-1)
    step: int = field(init=False, default=0)
    best: dict[str, float] = field(init=False, default_factory=dict)
    seconds: float = field(init=False, default=0.0)
    evaluations: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        networks = {name: Role(model.denoiser) for name, model in self.inputs.networks.items()}
        for name, role in {**self.inputs.roles, **networks}.items():
            require_finite(name, role)
        health = self.config.health
        rows = self.inputs.sources["data"](KeyedRandom(0, 0, "health", 0), health.conditions).condition
        self._probe = Probe(rows.to(self.device), health, self.inputs.model_config, self.config.batch)
        self.start_stage(0)

    @staticmethod
    def create(
        config: Config, *, teacher: Model | Denoiser | None = None, data: Source | None = None,
        callbacks: Sequence[Callback] = (), device: str = "auto",
    ) -> Trainer:  # fmt: skip
        """A trainer of the config, with your own teacher and data if given. Raises ``UserError`` on mistakes in it."""
        chosen = pick_device(device)
        return Trainer(config, build_inputs(config, chosen, teacher, data), chosen, callbacks=callbacks)

    # --- stages -------------------------------------------------------------------------------------------------------

    def start_stage(self, number: int) -> None:
        """Builds roles, objective and loop of a stage from the roles of the previous one.

        Raises ``UserError`` if roles or data do not match the objective.
        """
        stage = self.config.stages[number]
        settings = stage.objective
        before = dict(self.roles) if self.stage >= 0 else dict(self.inputs.roles)
        probe = self.inputs.sources["data"](KeyedRandom(0, 0, "probe", 0), 1).to(self.device)
        network = before["teacher" if "teacher" in before else "model"].module
        assert isinstance(network, Denoiser)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            networks = settings.networks(network, probe.shape, probe.condition)
        checks.require_new(stage, number, networks)
        if self.stage >= 0:
            self.roles.fetch()  # copies are created on the device
        others = {name: partial(self._copy_of, name) for name in self.inputs.networks}
        roles = roles_of_stage(before, stage.roles, stage.freeze, networks, others)
        if not probe.condition.nulls:
            self.inputs.model_config.require_guidable(guidance_of(settings))
        checks.require_needs(self.config, number, roles, probe)
        checks.require_comparable(self.config, number, roles)
        first = self.stage_ends[number] - stage.steps
        self.stage = number
        self.roles = Roles(roles, DTYPES[self.config.precision])
        for entered in roles.values():  # also outside ``Roles.predict``: in probes and validation
            if isinstance(entered.module, Denoiser):
                entered.module.precision = DTYPES[self.config.precision]
                if self.config.compile:
                    compile_blocks(entered.module.backbone)
        self.objective = settings.build(self.roles, StageContext(number, first, stage.steps))
        if self.config.offload:
            frozen = roles.keys() - stage.roles.keys() - dict(self.objective.experts).keys()
            self.roles.offload(frozen, self.device)
        if self.config.cuda_graphs:
            self.roles.record_evaluations()
        checks.require_trained(stage, number, self.objective)
        checks.require_one_generator(self.objective, self.roles)
        self.few_step = self.objective.few_step or (self.few_step if number else self._config_of("student").few_step)
        for name, role in stage.roles.items():
            due = [update.due for update in self.objective.updates if name in update.roles]
            self.roles[name].lr_factor = learning_rate(role, sum(d.count(first, self.stage_ends[number]) for d in due))
        self.loop = Loop(
            self.roles, self.objective, self.inputs.sources, self.config.batch, self.config.accumulate, stage.clip,
            self.config.seed, self.device, self.world, {
                update.name: min(MAX_LOST, max(1, update.due.count(first, self.stage_ends[number])))
                for update in self.objective.updates
            }, min(READ_EVERY, self.config.log_every),
        )  # fmt: skip

    @property
    def stage_ends(self) -> list[int]:
        """The step at which each stage ends."""
        return [sum(stage.steps for stage in self.config.stages[: i + 1]) for i in range(len(self.config.stages))]

    @property
    def student_config(self) -> ModelConfig:
        """The model config of the student: the teacher's, with the objective's sampling rule and settings."""
        origin = self._config_of("student")
        boundaries = tuple(lowest for _, lowest in self.objective.experts)
        backbones = [self._config_of(role).backbone | self.objective.backbone for role, _ in self.objective.experts]
        adapter = isinstance(self.roles.denoiser("student").backbone, AdapterView)
        return origin.model_copy(
            update={
                "few_step": self.few_step,
                "boundaries": boundaries if len(boundaries) > 1 else None,
                "backbone": origin.backbone | self.objective.backbone,
                "expert_backbones": tuple(backbones) if any(b != backbones[0] for b in backbones) else None,
                "lora": origin.lora if adapter else None,
                "precision": None if self.config.precision == "float32" else self.config.precision,
                "base_weights": "bfloat16" if adapter and self.config.weights != "float32" else None,
            }
        )

    def _config_of(self, role: str) -> ModelConfig:
        """The model config of the network that a role is a copy of."""
        origin = self.config.origins(self.stage).get(role, "")
        model = self.inputs.networks.get(origin)
        return self.inputs.model_config if model is None else model.config

    def _copy_of(self, name: str) -> Denoiser:
        """A copy of one of the run's networks, on the device."""
        return placed(copy.deepcopy(self.inputs.networks[name].denoiser), self.config, self.device, self.world)

    @property
    def generator(self) -> Denoiser:
        """The denoiser that is sampled and saved: the student, or all experts by noise level."""
        experts = [self.roles.denoiser(role) for role, _ in self.objective.experts]
        return experts[0] if len(experts) == 1 else routed(experts, [low for _, low in self.objective.experts])

    @property
    def student(self) -> Model:
        """The generator with its config, as ``samplers.generate`` expects it."""
        return Model(denoiser=self.generator, config=self.student_config)

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Trains from the current step to the end of the last stage.

        Raises ``Interrupted`` if a signal or ``max_hours`` requested a stop, after the callbacks' ``on_checkpoint``.
        """
        self._started, self._saved = time.monotonic() - self.seconds, time.monotonic()
        self._latest: dict[str, Tensor] = {}  # since the last log line: some updates are not due at a logged step
        self._health: dict[str, float] = {}
        save, end = False, self.stage_ends[-1]
        with ExitStack() as leaving, stop_requests(self.config.max_hours, self.world.rank, self.world.size) as stop:
            leaving.callback(self._report_lost)  # the updates that end training, too
            while self.step < end:
                self.notify("on_step_begin")
                with stop.raising_at(END):
                    self._latest |= self.one_step()
                self._observe(stop)
                stopping = self.world.any(stop.requested)
                save |= stopping or self.step == self.stage_ends[self.stage] or self._checkpoint_due()
                if save and (self._sound() or self.step == end):
                    self.notify_together("on_checkpoint")
                    save, self._saved = False, time.monotonic()
                if stopping and self.step < end:
                    raise Interrupted(self._stopped(stop, saved=not save))
            self.notify_together("on_end")

    def _observe(self, stop: StopRequests) -> None:
        """Everything that is due after a step but for its checkpoint: lost updates, health, log, validation. A second
        signal leaves out what networks are evaluated for, and nothing that is written."""
        self._report_lost()
        last = self.step == self.stage_ends[-1]
        if self._due(self.config.health.every):
            self._health = stop.unless_cut(partial(self.evaluate, self._check_health), {})
        self.seconds = time.monotonic() - self._started
        if last or self._due(self.config.log_every):
            self.notify_together("on_log", to_numbers(self._latest) | self._health)
            self._latest, self._health = {}, {}
        stop.unless_cut(partial(self.notify, "on_step"), None)  # previews
        if self.validate is not None and (last or self._due(self.config.validation.every)):
            value = stop.unless_cut(partial(self._score, self.validate), None)
            if value is not None:
                self._validated(value)

    def _checkpoint_due(self) -> bool:
        minutes = self.config.checkpoint.minutes
        old = minutes is not None and self.world.any(time.monotonic() - self._saved >= 60 * minutes)
        return old or self._due(self.config.checkpoint.every)

    def _sound(self) -> bool:
        """Whether the latest update of each kind was applied."""
        sound = self.loop.sound
        self._report_lost()  # what the device skipped was perhaps read only now
        return sound

    def _report_lost(self) -> None:
        for lost in self.loop.lost:
            self.notify("on_lost_update", lost)
        self.loop.lost.clear()

    def _stopped(self, stop: StopRequests, saved: bool) -> str:
        reason = next(filter(None, self.world.gather(stop.reason)))  # perhaps only another process got the signal
        state = "" if saved else ", where updates are being lost: the last checkpoint is an earlier one"
        return f"stopped at step {self.step} of {self.stage_ends[-1]} ({reason}){state}"

    def rehearse(self, validate: Validator | None) -> None:
        """Checks health and validates once, with no consequence, so that what cannot work is found before training."""
        if self.config.health.every:
            self.evaluate(self._check_health)
        if validate is not None:
            self._score(validate)

    def advance(self, step: int) -> dict[str, float]:
        """Trains up to ``step`` without callbacks; returns the latest metrics of these steps, as a log line has."""
        metrics: dict[str, Tensor] = {}
        while self.step < step:
            metrics |= self.one_step()
        return to_numbers(metrics)

    def one_step(self) -> dict[str, Tensor]:
        """Runs one step of the current stage, or of the next one if the current one is complete."""
        if self.step >= self.stage_ends[self.stage]:
            self.start_stage(self.stage + 1)
            require_same_state(self)
            self.best = {}  # scores of another objective or generator are not comparable
        before = self.roles.evaluations
        metrics = self.loop.step(self.step)
        self.evaluations += self.world.total(self.roles.evaluations - before)
        self.step += 1
        return metrics

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def notify(self, event: str, *details: Any) -> None:
        """Calls the callbacks' method for an event."""
        for callback in self.callbacks:
            getattr(callback, event)(self, *details)

    def notify_together(self, event: str, *details: Any) -> None:
        """The same where files are written: an error in one process ends all."""
        with self.world.together():
            self.notify(event, *details)

    def _check_health(self) -> dict[str, float]:
        """Compares samples of the averaged student with the teacher's; empty without a teacher."""
        if "teacher" not in self.inputs.roles:
            return {}
        with self.roles["student"].averaged(), torch.no_grad(), self.roles.resident("teacher") as teacher:
            return self._probe(self.student, teacher, guidance_of(self.config.stages[self.stage].objective))

    def evaluate(self, function: Callable[[], T]) -> T:
        """The result of a function that evaluates networks, from the first process: alone, or with all others where
        networks are split over them."""
        if not self.roles.split:
            return self.world.once(function)
        with self.world.together(exchanging=True):
            result = function()
        return self.world.gather(result)[0]

    def _score(self, validate: Validator) -> float | None:
        """The score of the averaged student."""

        def score() -> float | None:
            with self.roles["student"].averaged(), torch.no_grad():
                value = validate(self.generator, self.student_config, self.step)
            if value is not None and not math.isfinite(value):
                raise UserError(f"The score is {value}.")
            return value

        try:
            return self.evaluate(score)
        except UserError as error:
            raise type(error)(f"Validation (the keys under validation:) at step {self.step}: {error}") from error

    def _validated(self, value: float) -> None:
        if value < self.best.get("value", float("inf")):
            self.best = {"value": value, "step": self.step}
        self.notify_together("on_validation", value)

    # --- state --------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that training changed: the tensors of trained roles and of the objective, and the counters."""
        tensors: dict[str, Tensor] = {}
        for name, role in self._trained().items():
            tensors |= role_tensors(name, role)
        tensors |= {f"objective/{name}": value for name, value in self.objective.state.items()}
        cost = {"seconds": self.seconds, "evaluations": self.evaluations}
        return tensors, {"stage": self.stage, "step": self.step, **cost, "best": self.best}

    def load_state(self, tensors: StoredTensors, state: Mapping[str, Any]) -> None:
        """The inverse of ``state``. Raises ``KeyError`` on missing tensors or counters, ``ValueError`` on others."""
        counters = Counters.of(state)
        for stage in range(self.stage + 1, counters.stage + 1):
            self.start_stage(stage)
        for name, role in self._trained().items():
            restore_role(name, role, tensors)
        for name, value in self.objective.state.items():
            tensors.fill(f"objective/{name}", value)
        self.step, self.seconds, self.evaluations = counters.step, counters.seconds, counters.evaluations
        self.best = dict(state["best"])

    def _trained(self) -> dict[str, Role]:
        """The roles that training created."""
        return {name: role for name, role in self.roles.items() if name not in self.inputs.roles}
