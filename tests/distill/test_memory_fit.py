"""The changes of a config with which its run fits into the memory of a device."""

from __future__ import annotations

import pytest
from planned_runs import FASHION, GiB, config, free

from fewstep.core.errors import UserError
from fewstep.distill.config import Config
from fewstep.distill.config_files import load_config
from fewstep.distill.memory import Costs, plan_memory
from fewstep.distill.memory_fit import MARGIN, changed, changes, first_fit
from fewstep.models.live_memory import EvaluationMemory


def test_a_run_that_fits_needs_no_change_and_nothing_helps_a_tiny_device() -> None:
    assert first_fit(config(batch=2), 1.0, 1, Costs()).overrides == ()
    assert first_fit(config(batch=2), 0.001, 1, Costs()).overrides is None


def test_cuda_graphs_are_left_out_first() -> None:
    assert next(changes(config(batch=2, cuda_graphs=True))) == {"cuda_graphs": False}


def test_the_first_change_that_suffices_is_found() -> None:
    """The micro-batch is halved as often as needed, with as many samples per update as before."""
    costs, plain = Costs(), config(batch=8)
    whole = plan_memory(plain, costs=costs).total
    fit = first_fit(plain, MARGIN * 0.8 * whole / GiB, 1, costs)
    assert fit.overrides is not None
    assert len(fit.overrides) == 2
    batch, accumulate = (int(text.partition("=")[2]) for text in fit.overrides)
    assert batch * accumulate == 8
    assert fit.plan.total < 0.8 * whole
    assert load_config("configs/fashion/tdm.yaml", fit.overrides).batch == batch, "the overrides can be pasted"
    twice = plan_memory(changed(plain, [{"batch": 2 * batch, "accumulate": accumulate // 2}]), costs=costs)
    assert twice.total > 0.8 * whole, "a larger micro-batch would not fit"


def test_changes_that_are_not_needed_are_left_out() -> None:
    """Moments in 8 bits suffice, though smaller micro-batches were tried first."""
    plain = config(batch=8)
    whole = plan_memory(plain, costs=free).total
    fit = first_fit(plain, MARGIN * (whole - 2 * FASHION) / GiB, 1, free)
    assert fit.overrides is not None
    assert set(fit.overrides) == {f"stages.0.roles.{role}.optimizer=adamw8bit" for role in ("student", "fake")}


def test_options_that_are_set_already_are_not_proposed() -> None:
    pytest.importorskip("peft")
    full = config(batch=1, gradient_checkpointing=True, precision="bfloat16", adapters={"rank": 4}, weights="nf4")
    assert [list(change) for change in changes(full)] == [
        ["stages.0.roles.student.optimizer", "stages.0.roles.fake.optimizer"]
    ]


def test_networks_are_split_where_there_are_devices() -> None:
    assert {"shard": True} not in list(changes(config(), 1))
    assert {"shard": True} in list(changes(config(), 2))
    assert {"shard": True} not in list(changes(config(shard=True), 2))
    plain = config(batch=1, accumulate=2)
    whole = plan_memory(plain, 2, costs=free).total
    fit = first_fit(plain, MARGIN * 0.7 * whole / GiB, 2, free)
    assert fit.overrides == ("shard=true",)


def test_what_is_proposed_for_a_bundled_teacher_is_accepted() -> None:
    """Its weights stay in float32: only pipelines are loaded in bfloat16."""
    plain = config(batch=1)
    with pytest.raises(UserError, match="weights: bfloat16 does not act"):
        plan_memory(changed(plain, [{"precision": "bfloat16", "weights": "bfloat16"}]), costs=free)
    need = plan_memory(changed(plain, [{"precision": "bfloat16"}]), costs=half_in_bfloat16).total
    assert first_fit(plain, MARGIN * 1.01 * need / GiB, 1, half_in_bfloat16).overrides == ("precision=bfloat16",)


def half_in_bfloat16(settings: Config, *_: object) -> EvaluationMemory:
    """Evaluations whose memory is decided by the precision alone."""
    size = (1 if settings.precision == "bfloat16" else 2) * 100 * FASHION
    return EvaluationMemory(size, size)
