"""``fewstep app``: what a click on its page computes. The page is ``app_page.py``."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fewstep.api.models import Source, load, teacher_of_run
from fewstep.core.errors import UserError
from fewstep.eval.report.comparison import teacher_sampling
from fewstep.models.loading import Model, pipeline_of
from fewstep.samplers.generate import ImageGenerator
from fewstep.samplers.plan import SamplingConfig, plan

MOST_IMAGES = 20
ALL = "all"  # instead of a class label: the classes in turn
STUDENT_STEPS, TEACHER_STEPS = 8, 32  # the most that the page offers


@dataclass(frozen=True)
class Request:
    """A click: a prompt, a class label, or ``ALL`` classes in turn; steps of the model, seed, number of images."""

    subject: str | int
    steps: int
    seed: int
    n: int


class Result(NamedTuple):
    """Images, uint8 [n, C, H, W] or videos [n, F, 3, H, W], with their cost (in all, and per image) and guidance."""

    name: str
    images: Tensor
    seconds: float
    nfe: int
    guidance: float


class AppModels:
    """A model and, beside it, its teacher. They are shared by all who use the page: one click at a time computes."""

    def __init__(self, model: Model, teacher: Model | None = None) -> None:
        """Raises ``UserError`` if the teacher does not take what the model takes."""
        if teacher is not None and teacher.config.classes != model.config.classes:
            raise UserError(
                f"The teacher has {teacher.config.classes} classes and the model {model.config.classes} (0: prompts); "
                "name the model's own teacher with --teacher."
            )
        if teacher is not None and teacher.config.vocabulary != model.config.vocabulary:
            raise UserError("Teacher and model know different words; name the model's own teacher with --teacher.")
        if not model.config.classes and model.config.vocabulary is None:
            pipeline_of(model)  # refuses a model that takes neither labels nor prompts
        self.model, self.teacher = model, teacher
        self._lock = threading.Lock()
        self._pipelines: dict[Path, Any] = {}  # text encoders and VAE; student and teacher usually share them

    @staticmethod
    def load(source: Source, teacher: Source | None = None, device: str = "auto") -> AppModels:
        """A model as ``fewstep.load`` takes it. The teacher is the one named or, for a run, that of its config."""
        model = load(source, device)
        return AppModels(model, load(teacher, device) if teacher is not None else teacher_of_run(source, device))

    @property
    def default_steps(self) -> int:
        few_step = self.model.config.few_step
        return len(few_step.times) if few_step else TEACHER_STEPS // 2

    @property
    def most_steps(self) -> int:
        return max(STUDENT_STEPS, self.default_steps) if self.model.config.few_step else TEACHER_STEPS

    def check(self, subject: Any, steps: Any, seed: Any, n: Any) -> Request:
        """What the fields of the page contain, as a request. Raises ``UserError`` on what cannot be computed."""
        request = Request(
            subject if not isinstance(subject, str) else subject.strip(),
            whole("The number of steps", steps, 1, self.most_steps),
            whole("The seed", seed, 0, 2**53),
            whole("The number of images", n, 1, MOST_IMAGES),
        )
        classes = self.model.config.classes
        if classes:
            if request.subject != ALL and request.subject not in range(classes):
                raise UserError(f"The class must be between 0 and {classes - 1}, got {subject!r}.")
        elif not isinstance(request.subject, str) or not request.subject:
            raise UserError("Write a prompt: what should the image show?")
        plan(self.model, self._sampling(request))  # refuses a number of steps that the student does not support
        return request

    def subjects(self, request: Request) -> list[str]:
        """What each image should show, in words."""
        if isinstance(request.subject, str) and not self.model.config.classes:
            return [request.subject] * request.n
        names = class_names(self.model)
        return [names[k % len(names) if request.subject == ALL else int(request.subject)] for k in range(request.n)]

    def generate(self, request: Request) -> list[Result]:
        """The images of the teacher, if there is one, and of the model, from the same noise: image k is that of
        ``fewstep.sample`` with the same seed."""
        name = "Student" if self.teacher or self.model.config.few_step else "Model"
        rows = [(name, self.model, self._sampling(request))]
        if self.teacher is not None:
            rows.insert(0, ("Teacher", self.teacher, teacher_sampling(self.teacher, request.seed)))
        with self._lock:
            return [self._result(*row, request) for row in rows]

    def _sampling(self, request: Request) -> SamplingConfig:
        if self.model.config.few_step:
            return SamplingConfig(steps=request.steps, seed=request.seed)
        return replace(teacher_sampling(self.model, request.seed), steps=request.steps)

    def _result(self, name: str, model: Model, sampling: SamplingConfig, request: Request) -> Result:
        classes, subject = model.config.classes, request.subject
        if classes:
            generator = ImageGenerator(model)
            conditions = [k % classes if subject == ALL else int(subject) for k in range(request.n)]
        else:
            pipeline = self._pipeline(model) if model.config.vocabulary is None else None
            generator = ImageGenerator(model, [str(subject)], pipeline=pipeline)
            conditions = [0] * request.n
        start = time.perf_counter()
        images = generator(conditions, sampling)
        return Result(name, images, time.perf_counter() - start, generator.nfe, sampling.guidance)

    def _pipeline(self, model: Model) -> Any:
        folder = pipeline_of(model)
        if folder.path not in self._pipelines:
            self._pipelines[folder.path] = folder.pipeline().to(model.device)
        return self._pipelines[folder.path]


def class_names(model: Model) -> list[str]:
    """The names of a model's classes, or their numbers."""
    return list(model.config.class_names or [f"class {label}" for label in range(model.config.classes)])


def whole(what: str, value: Any, low: int, high: int) -> int:
    """``value`` as a whole number. Raises ``UserError`` if it is none between ``low`` and ``high``."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or not low <= value <= high:
        given = "nothing" if value is None else repr(value)
        raise UserError(f"{what} must be a whole number between {low} and {high}, got {given}.")
    return int(value)
