"""Time grids: N steps have N + 1 nodes, from the noisiest down to 0. Host floats, computed in float64."""

from __future__ import annotations

import torch

from fewstep.models.schedules import NoiseSchedule, shift


def time_uniform(steps: int, factor: float = 1.0) -> tuple[float, ...]:
    """``1, (N-1)/N, ..., 0``, moved towards noise by ``shift``. Raises ``ValueError`` for fewer than one step."""
    _check(steps)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return tuple(shift(t, factor).tolist())


def log_snr_uniform(schedule: NoiseSchedule, steps: int, low: float = -4.0, high: float = 4.0) -> tuple[float, ...]:
    """Nodes uniform in ``log_snr`` between ``low`` and ``high``, the last moved to t = 0 and the first to t = 1.

    The ends are cut because a flow's log-SNR runs over the whole real line; the cut is taken up by the end steps.
    """
    _check(steps)
    inner = schedule.time_of_log_snr(torch.linspace(low, high, steps + 1, dtype=torch.float64))
    return (1.0, *inner[1:-1].tolist(), 0.0)


def _check(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}")
