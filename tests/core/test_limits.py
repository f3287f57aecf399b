"""Numbers that no machine could honour are refused with a bound, before anything is allocated."""

from __future__ import annotations

import pytest
from commands import refused

from fewstep.api.sample import sample
from fewstep.cli.options import parse_seeds
from fewstep.core.errors import UserError
from fewstep.core.limits import MOST_AT_ONCE, MOST_STEPS, check_count
from fewstep.samplers.plan import SamplingConfig


def test_the_bounds_themselves_are_allowed() -> None:
    check_count("n", 1, 3)
    check_count("n", 3, 3)
    with pytest.raises(UserError, match="n must be at least 1, got 0"):
        check_count("n", 0, 3)
    with pytest.raises(UserError, match="n must be at most 3, got 4"):
        check_count("n", 4, 3)


def test_huge_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="n must be at most 100,000, got 100,001"):
        sample("fashion", n=MOST_AT_ONCE + 1)
    with pytest.raises(UserError, match="steps must be at most 10,000, got 10,001"):
        sample("fashion", n=1, sampling=SamplingConfig(steps=MOST_STEPS + 1))
    with pytest.raises(UserError, match="The number of --seeds must be at most 1,000,000, got 1,000,001"):
        parse_seeds("0-1000000", 0)
    with pytest.raises(UserError, match="--seeds takes numbers"):
        parse_seeds(f"0-{'9' * 5_000}", 0)
    assert parse_seeds("999999999998-999999999999", 0) == [999999999998, 999999999999]


@pytest.mark.parametrize(
    "command",
    [
        ["data", "ode-pairs", "fashion", "--out", "x.safetensors"], ["data", "preferences", "fashion", "--out", "x"],
        ["eval", "fashion"], ["winrate", "fashion", "fashion"], ["solver", "compare", "fashion"],
    ],
)  # fmt: skip
def test_commands_name_the_most_that_they_take(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *command, "--n", 1_000_001)
    assert "'--n'" in message
    assert "1000000" in message
