"""Laws of times: the numbers of released recipes, bounds as noise levels, and the restriction to a range."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.objectives.cdm import CDM
from fewstep.distill.time_laws import CappedTimes, RenoiseTimes, TimeLaw

N = 2_000_000


class Equidistant(KeyedRandom):
    """Numbers at equal distances instead of random ones: means become integrals."""

    def __init__(self) -> None:
        super().__init__(0, 0, "equidistant", 0)

    def uniform(self, size: int, low: float = 0.0, high: float = 1.0, stream: str = "time") -> Tensor:
        return low + (high - low) * (torch.arange(size, dtype=torch.float64) + 0.5) / size


def times(law: TimeLaw, n: int = N, **bounds: float) -> Tensor:
    return law.sample(Equidistant(), n, **bounds)


def share(where: Tensor) -> float:
    return where.double().mean().item()


@pytest.mark.parametrize(
    ("factor", "mean", "above", "below"),
    [
        (1, 0.5000, (0.5000, 0.1000, 0.0200), 0.1000),
        (3, 0.6760, (0.7500, 0.2500, 0.0577), 0.0357),
        (5, 0.7471, (0.8333, 0.3571, 0.0926), 0.0217),
        (7, 0.7883, (0.8750, 0.4375, 0.1250), 0.0156),
        (8, 0.8034, (0.8889, 0.4706, 0.1404), 0.0137),
    ],
)
def test_the_shifted_uniform_laws_have_the_tabulated_numbers(
    factor: float, mean: float, above: tuple[float, ...], below: float
) -> None:
    """P(t > y) = 1 - y / (k - (k - 1) y), the mean is k / (k - 1) - k ln k / (k - 1)^2, the median k / (k + 1)."""
    t = times(TimeLaw(shift=factor))
    assert t.mean().item() == pytest.approx(mean, abs=5e-5)
    assert [share(t > y) for y in (0.5, 0.9, 0.98)] == pytest.approx(above, abs=5.1e-5)
    assert share(t < 0.1) == pytest.approx(below, abs=5.1e-5)
    assert t.median().item() == pytest.approx(factor / (factor + 1), abs=1e-6)


def test_a_law_clamped_after_the_shift_has_mass_at_its_bounds() -> None:
    """Self-Forcing's: uniform, shift 5, clamp to [.02, .98]."""
    t = times(TimeLaw(shift=5, low=0.02, high=0.98, clamp="after"))
    assert t.mean().item() == pytest.approx(0.7461, abs=5e-5)
    assert share(t == 0.98) == pytest.approx(0.0926, abs=5e-5)
    assert share(t == 0.02) == pytest.approx(0.0041, abs=5e-5)


def test_a_law_clamped_before_the_shift_has_the_shifted_density_between_its_bounds() -> None:
    """Bounds are noise levels: with a shift, u lies between the levels that the shift maps to them."""
    t = times(TimeLaw(shift=5, low=0.3, high=0.9))
    assert 0.3 <= t.min() < 0.3 + 1e-5
    assert 0.9 - 1e-5 < t.max() <= 0.9
    survival = {y: 1 - y / (5 - 4 * y) for y in (0.3, 0.5, 0.7, 0.9)}
    for y in (0.5, 0.7):
        expected = (survival[y] - survival[0.9]) / (survival[0.3] - survival[0.9])
        assert share(t > y) == pytest.approx(expected, abs=1e-5)


def test_fastgens_shifted_law_is_expressed_to_a_thousandth() -> None:
    """Theirs: u ~ U(.001, .999), shift 5, clamp to [.001, .999]."""
    u = times(TimeLaw(low=0.001, high=0.999))
    theirs = (5 * u / (1 + 4 * u)).clamp(0.001, 0.999)
    ours = times(TimeLaw(shift=5, low=0.001, high=0.999, clamp="after"))
    assert (ours.min() >= 0.001) & (ours.max() <= 0.999)
    for y in torch.linspace(0.01, 0.99, 50).tolist():
        assert share(ours > y) == pytest.approx(share(theirs > y), abs=1.1e-3)


def test_logit_normal_times() -> None:
    t = times(TimeLaw(kind="logit_normal"))
    assert share(t > 0.9) == pytest.approx(0.0140, abs=5e-5)
    logits = torch.logit(times(TimeLaw(kind="logit_normal", mean=0.4, std=1.4)))
    assert (logits.mean().item(), logits.std().item()) == pytest.approx((0.4, 1.4), abs=1e-3)


@pytest.mark.parametrize(("alpha", "beta"), [(4.0, 1.5), (1.0, 1.0), (0.6, 0.6), (2.0, 5.0)])
def test_beta_times(alpha: float, beta: float) -> None:
    t = times(TimeLaw(kind="beta", alpha=alpha, beta=beta))
    total = alpha + beta
    variance = alpha * beta / (total**2 * (total + 1))
    assert (t.mean().item(), t.var().item()) == pytest.approx((alpha / total, variance), abs=2e-5)


def test_the_grid_of_a_four_step_sampler() -> None:
    t = times(TimeLaw(kind="grid", steps=4, shift=3), 4000)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == pytest.approx([0.5, 0.75, 0.9, 1.0])
    assert counts.tolist() == [1000] * 4
    inside = times(TimeLaw(kind="grid", steps=4, shift=3, low=0.75, high=0.95), 4000)
    assert inside.unique().tolist() == pytest.approx([0.75, 0.9])


RESTRICTED = {"logit_normal": {"mean": 0.4, "std": 1.4}, "beta": {"alpha": 2.0, "beta": 3.0}, "grid": {"steps": 200}}


class Fixed(KeyedRandom):
    """The same number every time."""

    def __init__(self, value: float) -> None:
        super().__init__(0, 0, "fixed", 0)
        self.value = value

    def uniform(self, size: int, low: float = 0.0, high: float = 1.0, stream: str = "time") -> Tensor:
        return torch.full((size,), low + (high - low) * self.value, dtype=torch.float64)


def test_the_times_of_a_grid_are_exact_at_its_bounds() -> None:
    """Each time k / N has the probabilities from (k - 1) / N to k / N, and counts as within bounds equal to it."""
    for u, time in ((0.0, 0.1), (0.05, 0.1), (0.3, 0.3), (0.30001, 0.4), (1.0, 1.0)):
        assert TimeLaw(kind="grid", steps=10).sample(Fixed(u), 1).item() == pytest.approx(time)
    for k in range(1, 11):
        law = TimeLaw(kind="grid", steps=10, low=k / 10, high=k / 10)
        assert times(law, 100).unique().tolist() == [k / 10]


def test_logit_normal_times_stay_within_a_millionth_of_the_probability() -> None:
    """Random numbers of 0 and 1 give finite logits, the quantiles of 1e-6 and 1 - 1e-6."""
    for u, quantile in ((0.0, -4.753424), (1.0, 4.753424)):
        t = TimeLaw(kind="logit_normal", mean=0.4, std=1.4).sample(Fixed(u), 1)
        assert torch.logit(t).item() == pytest.approx(0.4 + 1.4 * quantile, abs=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "beta", "grid"])
@pytest.mark.parametrize("factor", [1.0, 5.0])
def test_a_range_restricts_a_law_to_its_conditional_distribution(kind: str, factor: float) -> None:
    """The times between .4 and .8 are distributed as those of the free law that lie there."""
    law = TimeLaw.model_validate({"kind": kind, "shift": factor, **RESTRICTED.get(kind, {})})
    free, restricted = times(law), times(law, above=0.4, below=0.8)
    inside = free[(free >= 0.4) & (free <= 0.8)]
    assert restricted.min() >= 0.4
    assert restricted.max() <= 0.8
    for y in (0.5, 0.6, 0.7):
        assert share(restricted > y) == pytest.approx(share(inside > y), abs=2e-4)


def test_a_range_can_differ_by_sample_and_a_range_outside_gives_the_nearer_bound() -> None:
    above = torch.tensor([0.1, 0.5, 0.0, 0.99], dtype=torch.float64)
    below = torch.tensor([0.2, 0.6, 0.01, 1.0], dtype=torch.float64)
    t = RenoiseTimes().sample(KeyedRandom(0, 0, "test", 0), 4, above=above, below=below)
    assert (t[:2] > above[:2]).all()
    assert (t[:2] < below[:2]).all()
    assert t[2:].tolist() == [0.02, 0.99]


def test_default_laws_are_the_uniform_numbers_of_their_stream_bit_for_bit() -> None:
    def random() -> KeyedRandom:
        return KeyedRandom(3, 7, "student", 2)

    assert torch.equal(TimeLaw().sample(random(), 9), random().uniform(9))
    assert torch.equal(RenoiseTimes().sample(random(), 9, "gan"), random().uniform(9, 0.02, 0.98, "gan"))
    t_student = torch.tensor([1.0, 0.75, 0.5, 0.01], dtype=torch.float64)
    cleaner = 0.02 + random().uniform(4) * (t_student.clamp(0.02, 0.98) - 0.02)
    assert torch.equal(CappedTimes(within="cleaner").capped(random(), t_student), cleaner)
    u = random().uniform(9).clamp(1e-6, 1 - 1e-6)
    normal = TimeLaw(kind="logit_normal", std=1.4).sample(random(), 9)
    assert torch.equal(normal, torch.sigmoid(1.4 * torch.special.ndtri(u)))


def test_capped_times_stay_below_the_students() -> None:
    t_student = torch.full((N,), 0.5, dtype=torch.float64)
    clamped = CappedTimes(within="cleaner", clamp="after").capped(Equidistant(), t_student)
    assert share(clamped == 0.02) == pytest.approx(0.02 / 0.5, abs=1e-5)  # as CDM's code: U(0, t_student), clamped
    assert clamped.max() <= 0.5
    assert times(CappedTimes(within="all")).max() > 0.97


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.9, "high": 0.1}, "low=0.9 must not be above high=0.1"),
        ({"std": 2.0}, "std is a setting of kind logit_normal, not of uniform"),
        ({"kind": "beta", "steps": 3}, "steps is a setting of kind grid, not of beta"),
        ({"kind": "grid"}, "needs steps"),
        ({"kind": "grid", "steps": 2, "low": 0.6, "high": 0.9}, "none of the 2 times"),
        ({"shift": math.inf}, "finite"),
        ({"mean": math.nan}, "finite"),
        ({"shift": 0.0}, "greater than or equal to 0.0001"),
        ({"low": -0.1}, "greater than or equal to 0"),
    ],
)
def test_a_law_that_does_not_act_as_written_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TimeLaw.model_validate(settings)


def run(objective: dict[str, object]) -> dict[str, object]:
    roles = {"student": {"lr": 1e-4}, "fake": {"lr": 1e-4}}
    return {"teacher": "fashion", "stages": [{"steps": 5, "objective": objective, "roles": roles}]}


def test_a_word_stands_for_a_laws_kind_or_its_range() -> None:
    parsed = parse_config(run({"name": "tdm", "renoise_times": "nested"}), "test").stages[0].objective
    assert parsed.renoise_times.within == "nested"  # type: ignore[attr-defined]
    parsed = parse_config(run({"name": "dmd2", "critic_times": "logit_normal"}), "test").stages[0].objective
    assert parsed.critic_times.kind == "logit_normal"  # type: ignore[attr-defined]
    assert str(parsed.critic_times) == "logit_normal(0, 1) on 0 to 1"  # type: ignore[attr-defined]
    clamped = TimeLaw(kind="beta", alpha=2.0, beta=0.5, shift=5, low=0.02, high=0.98, clamp="after")
    assert str(clamped) == "beta(2, 0.5) shifted by 5 clamped to 0.02 to 0.98"
    with pytest.raises(UserError, match=r"ca_times\.within = 'late'.*'all' or 'cleaner'"):
        parse_config(run({"name": "cdm", "ca_times": "late"}), "test")


@pytest.mark.parametrize(
    ("law", "words"), [(TimeLaw, ["uniform", "logit_normal", "beta", "grid"]), (CappedTimes, ["all", "cleaner"])]
)
def test_the_schema_of_a_law_allows_its_words_and_a_mapping(law: type[TimeLaw], words: list[str]) -> None:
    schema = TypeAdapter(dict[str, law]).json_schema()["additionalProperties"]  # type: ignore[valid-type]
    definitions = TypeAdapter(dict[str, law]).json_schema().get("$defs", {})  # type: ignore[valid-type]
    options = (definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema)["anyOf"]
    assert options[0] == {"enum": words}
    assert options[1]["type"] == "object"
    assert {"shift", "low", "high", law.short} <= set(options[1]["properties"])


@pytest.mark.parametrize(
    ("objective", "old", "new"),
    [
        ("dmd2", {"t_range": [0.1, 0.9]}, "renoise_times"),
        ("decoupled_dmd", {"t_range": [0.1, 0.9]}, "dm_times"),
        ("diffusion_dpo", {"t_range": [0.1, 0.9]}, "student_times"),
        ("cdm", {"inner": [0.1, 0.9]}, "rollout_times"),
        ("flow_matching", {"time": "logit_normal"}, "student_times.kind"),
        ("flow_matching", {"time_std": 1.4}, "student_times.std"),
    ],
)
def test_the_keys_that_laws_replaced_are_answered_with_the_new_ones(
    objective: str, old: dict[str, object], new: str
) -> None:
    with pytest.raises(UserError, match=rf"it is now called '{new}'"):
        parse_config(run({"name": objective, **old}), "test")


def test_stable_diffusion_3_trains_at_the_times_of_the_release() -> None:
    """Its scheduler applies shift 3 to U(.25, .95): the student is trained at .5 to .983, never below the last time of
    the sampler, 1, .9, .75, .5."""
    config = load_config("configs/sd3/cdm.yaml")
    settings = config.stages[0].objective
    assert isinstance(settings, CDM)
    u = times(TimeLaw(low=0.25, high=0.95))
    torch.testing.assert_close(times(settings.rollout_times), 3 * u / (1 + 2 * u), rtol=0, atol=1e-8)
    assert times(settings.rollout_times).min() >= 0.5
    clamped = {"low": 0.02, "high": 0.98, "clamp": "after", "shift": 1.0}
    for law in (settings.renoise_times, settings.ca_times, settings.student_times, settings.critic_times):
        assert clamped.items() <= law.model_dump().items()


@pytest.mark.parametrize("config", ["sd3/cdm", "wan/dmd2", "wan/phased_dmd", "qwen_image/phased_dmd", "flux/tdm"])
def test_the_laws_of_flow_models_have_the_shift_of_the_students_grid(config: str) -> None:
    name = Path("configs", config + ".yaml")
    for stage in load_config(name).stages:
        laws = [stage.objective.rollout_times] if isinstance(stage.objective, CDM) else [stage.objective.renoise_times]  # type: ignore[attr-defined]
        assert {law.shift for law in laws} == {stage.objective.shift}  # type: ignore[attr-defined]
