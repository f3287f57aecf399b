"""The solvers by name, with what a person wants to know of each before choosing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.core.registry import Registry
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.dc_solver import dc_solver, read_ratios
from fewstep.samplers.ddim import ddim
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import multistep_pp, multistep_sde, singlestep_pp
from fewstep.samplers.dpm_solver_v3 import Statistics, dpm_solver_v3
from fewstep.samplers.euler import euler
from fewstep.samplers.exponential import Noise
from fewstep.samplers.few_step import renoise
from fewstep.samplers.heun import heun, heun_edm
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.unipc import unipc

Rule = Callable[[Predictor, Tensor, Sequence[float]], Tensor]
NoisyRule = Callable[[Predictor, Tensor, Sequence[float], Noise], Tensor]


@dataclass(frozen=True)
class Solver:
    """``order``: how fast the error falls once the first steps, of lower order, no longer matter; ``reads``: network
    evaluations a step, ends aside. ``by_log_snr``: it takes differences over log-SNR, so that a grid should not begin
    where that is infinite."""

    run: Rule | NoisyRule
    order: int
    reads: int
    paper: str
    by_log_snr: bool = False
    noisy: bool = False

    def __call__(self, predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
        return self.run(predict, x, times, noise) if self.noisy else self.run(predict, x, times)  # type: ignore[call-arg]

    def evaluations(self, schedule: NoiseSchedule, times: Sequence[float]) -> int:
        """Reads of the network over a grid, counted on one that does nothing."""
        predict = Predictor(Denoiser(_Nothing(), schedule, "x0"), Condition())
        self(predict, torch.zeros(1, 1), times, lambda: torch.zeros(1, 1))
        return predict.nfe


class _Nothing(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t)


PP, UNIPC = "arXiv 2211.01095", "arXiv 2302.04867"
SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, 1, 1, "in time; a flow's DDIM"),
    "ddim": Solver(ddim, 1, 1, "arXiv 2010.02502"),
    "ddpm": Solver(partial(ddim, eta=1.0), 1, 1, "arXiv 2006.11239: DDIM with eta 1", noisy=True),
    "heun": Solver(heun, 2, 2, "arXiv 2206.00364, in time"),
    "heun_edm": Solver(heun_edm, 2, 2, "arXiv 2206.00364, in sigma / alpha", by_log_snr=True),
    "dpm_solver_2": Solver(partial(dpm_solver, order=2), 2, 2, "arXiv 2206.00927", by_log_snr=True),
    "dpm_solver_3": Solver(partial(dpm_solver, order=3), 3, 3, "arXiv 2206.00927", by_log_snr=True),
    "dpmpp_2s": Solver(singlestep_pp, 2, 2, PP, by_log_snr=True),
    "dpmpp_2m": Solver(multistep_pp, 2, 1, PP, by_log_snr=True),
    "dpmpp_3m": Solver(partial(multistep_pp, order=3), 2, 1, f"{PP}, as published", by_log_snr=True),
    "dpmpp_3m_exact": Solver(
        partial(multistep_pp, order=3, relaxation="none"), 3, 1, f"{PP}, of order 3", by_log_snr=True
    ),
    "sde_dpmpp_1": Solver(partial(multistep_sde, order=1), 1, 1, PP, by_log_snr=True, noisy=True),
    "sde_dpmpp_2m": Solver(multistep_sde, 2, 1, PP, by_log_snr=True, noisy=True),
    "unipc_2": Solver(partial(unipc, order=2), 3, 1, UNIPC, by_log_snr=True),
    "unipc_3": Solver(partial(unipc, order=3), 4, 1, UNIPC, by_log_snr=True),
}
STUDENTS: dict[str, Solver] = {
    "deterministic": SOLVERS["ddim"],
    "renoise": Solver(renoise, 1, 1, "arXiv 2303.01469, Algorithm 1", noisy=True),
}


STATISTICS, RATIOS = "statistics.safetensors", "dc_solver.json"
V3, DC = "arXiv 2310.13268; needs fewstep ems", "arXiv 2409.03755; needs fewstep ratios"


@dataclass(frozen=True)
class Measured:
    """A solver that knows something of its model: ``build(folder, steps, guidance)`` makes its rule of what is found in
    the model's folder."""

    build: Callable[[Path, int, float], Rule]
    order: int
    paper: str


def _v3(folder: Path, steps: int, guidance: float, order: int) -> Rule:
    return partial(dpm_solver_v3, statistics=Statistics.read(folder / STATISTICS), order=order, pseudo=True)


def _dc(folder: Path, steps: int, guidance: float) -> Rule:
    return partial(dc_solver, ratios=read_ratios(folder / RATIOS, steps, guidance))


MEASURED: dict[str, Measured] = {
    "dc_solver_2": Measured(_dc, 3, DC),
    "dpm_solver_v3_2": Measured(partial(_v3, order=2), 2, V3),
    "dpm_solver_v3_3": Measured(partial(_v3, order=3), 3, V3),
}


REGISTRY: Registry[Solver | Measured] = Registry(
    "solver", lambda: SOLVERS | MEASURED, lambda value: isinstance(value, Solver | Measured),
    "a fewstep.samplers.solvers.Solver",
)  # fmt: skip


def find_solver(name: str, steps: int, guidance: float = 1.0, folder: Path | None = None) -> Solver:
    """A solver by name; a ``Measured`` one reads what it needs from the model's ``folder``. Raises ``UserError`` with
    the nearest known name, or saying which file is missing."""
    found = REGISTRY.resolve(name)
    if isinstance(found, Measured):
        rule = found.build(folder or Path(), steps, guidance)
        return Solver(rule, found.order, 1, found.paper, by_log_snr=True)
    return found


def described() -> list[tuple[str, str, str, str]]:
    """Name, order, evaluations a step and paper of every solver."""
    known = [(name, str(solver.order), str(solver.reads), solver.paper) for name, solver in SOLVERS.items()]
    return known + [(name, str(solver.order), "1", solver.paper) for name, solver in MEASURED.items()]
