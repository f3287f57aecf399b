"""The scheduler of an export: the pipeline's default call evaluates the student at exactly its times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import TINY

from fewstep.core.errors import UserError
from fewstep.models.hub.few_step_scheduler import default_times, scheduler_for, step_changes
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.model_config import FewStep
from fewstep.samplers.grids import time_uniform

diffusers = pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
DISCRETE = ("sd", "sd2", "sdxl", "pixart")
FLOWS = [name for name in TINY if name not in DISCRETE]
RULES = ("deterministic", "renoise")


def few(steps: int, shift: float, rule: Any) -> FewStep:
    return FewStep(times=time_uniform(steps, shift)[:-1], rule=rule, shift=shift)


def seen(folder: PipelineFolder, scheduler: Any, steps: int) -> list[float]:
    """The times after the scheduler was saved and loaded."""
    again = type(scheduler).from_config(scheduler.config)
    return default_times(again, steps, folder.family.passes_sigmas)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("name", FLOWS)
def test_the_times_of_a_flow_are_exact_at_any_shift(saved: Saved, name: str, shift: float, rule: str) -> None:
    folder = PipelineFolder.open(saved(name))
    for steps in (1, 2, 3, 4, 7, 30):
        student = few(steps, shift, rule)
        scheduler = scheduler_for(folder, student)
        assert seen(folder, scheduler, steps) == pytest.approx(student.times, abs=1e-6)
        assert scheduler.sigmas.tolist() == pytest.approx([*student.times, 0.0], abs=1e-6)
        assert type(scheduler).__name__.startswith("FlowMatchLCM" if rule == "renoise" else "FlowMatchEuler")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", DISCRETE)
def test_the_times_of_a_discrete_schedule_are_exact_where_they_are_timesteps(
    saved: Saved, name: str, rule: str
) -> None:
    folder = PipelineFolder.open(saved(name))
    for steps in (1, 2, 4, 5, 8, 10):
        student = few(steps, 1.0, rule)
        scheduler = scheduler_for(folder, student)
        assert seen(folder, scheduler, steps) == pytest.approx(student.times, abs=1e-9)
        expected = folder.pipeline().scheduler.alphas_cumprod
        assert scheduler.alphas_cumprod.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(3, 1.0), (4, 3.0)])
def test_times_between_two_timesteps_are_refused(saved: Saved, steps: int, shift: float) -> None:
    folder = PipelineFolder.open(saved("sd"))
    with pytest.raises(UserError, match=r"between two timesteps.*divides 1000, and shift: 1"):
        scheduler_for(folder, few(steps, shift, "deterministic"))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_times_that_no_scheduler_has_are_refused(saved: Saved, name: str) -> None:
    student = FewStep(times=(1.0, 0.9, 0.3, 0.2), rule="deterministic")
    with pytest.raises(UserError, match=r"No scheduler of diffusers samples a .* at the student's times 1, 0\.9, 0\.3"):
        scheduler_for(PipelineFolder.open(saved(name)), student)


def test_the_experts_of_a_call_change_after_their_last_step() -> None:
    assert step_changes((1.0, 0.75, 0.5, 0.25), (0, 0, 1, 1)) == {1: 1, 3: 0}
    assert step_changes((1.0, 0.5), (0, 1)) == {0: 1, 1: 0}
