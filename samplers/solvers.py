"""The solvers by name, with their order, cost and paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError, nearest
from fewstep.core.registry import Registry
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.schedules import NoiseSchedule
from fewstep.samplers.aliases import ALIASES, NEAREST
from fewstep.samplers.dc_solver import dc_solver, read_ratios
from fewstep.samplers.ddim import ddim
from fewstep.samplers.deis import deis
from fewstep.samplers.dpm_solver import dpm_solver
from fewstep.samplers.dpm_solver_pp import multistep_pp, multistep_sde, singlestep_pp
from fewstep.samplers.dpm_solver_v3 import Statistics, dpm_solver_v3
from fewstep.samplers.er_sde import er_sde
from fewstep.samplers.euler import euler
from fewstep.samplers.exponential import Noise
from fewstep.samplers.few_step import renoise
from fewstep.samplers.grids import check_times
from fewstep.samplers.heun import heun, heun_edm
from fewstep.samplers.ipndm import gradient_estimation, ipndm
from fewstep.samplers.predictor import HALF, Predictor
from fewstep.samplers.sa_solver import sa_solver
from fewstep.samplers.seeds import seeds
from fewstep.samplers.tcd import tcd
from fewstep.samplers.unipc import unipc

Rule = Callable[[Predictor, Tensor, Sequence[float]], Tensor]
NoisyRule = Callable[[Predictor, Tensor, Sequence[float], Noise], Tensor]


@dataclass(frozen=True)
class Solver:
    """``run(predict, x, times)``, or ``run(predict, x, times, noise)`` if ``noisy``, maps the state ``x`` [B, ...] at
    ``times[0]`` to the state at ``times[-1]``. The ``order`` of convergence (of a noisy solver without its noise) and
    the network's ``evaluations_per_step`` disregard the first and last steps. ``by_log_snr``: the rule uses differences
    in log-SNR, so its grid should not start where that is infinite.

    A call checks that the times decrease. A state in half precision is integrated in float32 and returned as it came;
    the network receives it in half precision.
    """

    run: Rule | NoisyRule
    order: int
    evaluations_per_step: int
    paper: str
    by_log_snr: bool = False
    noisy: bool = False
    name: str = field(default="", compare=False)

    def __call__(self, predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
        check_times(times)
        if x.dtype in HALF:
            predict.input_dtype = x.dtype
        state = x.float() if x.dtype in HALF else x
        return self.run(predict, state, times, *((noise,) if self.noisy else ())).to(x.dtype)

    def count_evaluations(self, schedule: NoiseSchedule, times: Sequence[float]) -> int:
        """The network evaluations over ``times``, counted with a network that returns zeros."""
        predict = Predictor(Denoiser(_Zeros(), schedule, "x0"), Condition())
        state = torch.zeros(1)
        self(predict, state, times, lambda: state)
        return predict.nfe


class _Zeros(nn.Module):
    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return torch.zeros_like(x_t)


PP, UNIPC, RES = "arXiv 2211.01095", "arXiv 2302.04867", "arXiv 2308.02157"
DEIS, SEEDS = "arXiv 2204.13902", "arXiv 2305.14267"
_BUILT_IN: dict[str, Solver] = {
    "euler": Solver(euler, 1, 1, "in time; DDIM on a flow"),
    "ddim": Solver(ddim, 1, 1, "arXiv 2010.02502"),
    "ddpm": Solver(partial(ddim, eta=1.0), 1, 1, "arXiv 2006.11239: DDIM with eta 1", noisy=True),
    "heun": Solver(heun, 2, 2, "arXiv 2206.00364, in time"),
    "heun_edm": Solver(heun_edm, 2, 2, "arXiv 2206.00364, in sigma / alpha"),
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
    "sde_dpmpp_2m_exact": Solver(
        partial(multistep_sde, relaxation="none"), 2, 1, f"{PP}, with exact weights", by_log_snr=True, noisy=True
    ),
    "sde_dpmpp_3m": Solver(
        partial(multistep_sde, order=3), 2, 1, f"{PP}, as k-diffusion's code", by_log_snr=True, noisy=True
    ),
    "seeds_2": Solver(seeds, 2, 2, SEEDS, by_log_snr=True, noisy=True),
    "seeds_3": Solver(partial(seeds, order=3), 3, 3, SEEDS, by_log_snr=True, noisy=True),
    "sa_solver": Solver(sa_solver, 4, 1, "arXiv 2309.05019", by_log_snr=True, noisy=True),
    "er_sde": Solver(er_sde, 2, 1, "arXiv 2309.06169, three stages", noisy=True),
    "deis_2": Solver(partial(deis, order=2), 2, 1, f"{DEIS}, tAB"),
    "deis_3": Solver(deis, 3, 1, f"{DEIS}, tAB"),
    "ipndm": Solver(ipndm, 2, 1, f"{DEIS}; order 4 on equal steps of sigma / alpha"),
    "gradient_estimation": Solver(gradient_estimation, 1, 1, "arXiv 2306.04848"),
    "res_2s": Solver(partial(singlestep_pp, relaxation="none"), 2, 2, RES, by_log_snr=True),
    "res_multistep": Solver(
        partial(multistep_pp, relaxation="none"), 2, 1, f"{RES}; DPM-Solver++ 2M, exact", by_log_snr=True
    ),
    "unipc_2_bh1": Solver(partial(unipc, order=2, variant="bh1"), 3, 1, f"{UNIPC}, B(h) = h", by_log_snr=True),
    "unipc_2": Solver(partial(unipc, order=2), 3, 1, UNIPC, by_log_snr=True),
    "unipc_3": Solver(partial(unipc, order=3), 4, 1, UNIPC, by_log_snr=True),
    "unipc_3_bh1": Solver(partial(unipc, order=3, variant="bh1"), 4, 1, f"{UNIPC}, B(h) = h", by_log_snr=True),
    "tcd": Solver(tcd, 1, 1, "arXiv 2402.19159; for consistency students", noisy=True),
    "renoise": Solver(renoise, 1, 1, "arXiv 2303.01469, Algorithm 1; for consistency students", noisy=True),
}
SOLVERS = {name: replace(solver, name=name) for name, solver in _BUILT_IN.items()}
STUDENT_SOLVERS: dict[str, Solver] = {
    "deterministic": SOLVERS["ddim"],
    "renoise": SOLVERS["renoise"],
}


class FitRequest(NamedTuple):
    """What a fitted solver is asked for: the model's folder, number of steps, guidance scale, grid as text, and the
    model itself, or None to accept the fit of any model."""

    folder: Path
    steps: int
    guidance: float = 1.0
    grid: str = "time"
    denoiser: Denoiser | None = None


@dataclass(frozen=True)
class FittedSolver:
    """A multistep solver in log-SNR with coefficients fitted to the model; ``build(request)`` reads them from the
    model's folder and returns the rule, or raises ``UserError`` where they do not belong to the request."""

    build: Callable[[FitRequest], Rule]
    order: int
    paper: str
    evaluations_per_step: ClassVar[int] = 1


def _build_v3(request: FitRequest, order: int) -> Rule:
    of_guidance = request.folder / f"statistics-{request.guidance:g}.safetensors"
    file = of_guidance if of_guidance.is_file() else request.folder / "statistics.safetensors"
    statistics = Statistics.read(file, request.guidance, request.denoiser)
    return partial(dpm_solver_v3, statistics=statistics, order=order, pseudo=True)


def _build_dc(request: FitRequest) -> Rule:
    file = request.folder / "dc_solver.json"
    ratios = read_ratios(file, request.steps, request.guidance, grid=request.grid, denoiser=request.denoiser)
    return partial(dc_solver, ratios=ratios)


V3, DC = "arXiv 2310.13268; needs fewstep solver fit-v3", "arXiv 2409.03755; needs fewstep solver fit-dc"
FITTED_SOLVERS: dict[str, FittedSolver] = {
    "dc_solver_2": FittedSolver(_build_dc, 3, DC),
    "dpm_solver_v3_2": FittedSolver(partial(_build_v3, order=2), 2, V3),
    "dpm_solver_v3_3": FittedSolver(partial(_build_v3, order=3), 3, V3),
}
REGISTRY: Registry[Solver | FittedSolver] = Registry(
    "solver", lambda: SOLVERS | FITTED_SOLVERS, lambda value: isinstance(value, Solver | FittedSolver),
    "a fewstep.samplers.solvers.Solver",
)  # fmt: skip


def resolve_solver(name: str) -> Solver | FittedSolver:
    """A solver by short or dotted name or by an alias; your own solvers precede aliases. Raises ``UserError`` on an
    unknown name and on a published rule that is not provided, with the nearest one."""
    if name in REGISTRY:
        return REGISTRY.resolve(name)
    if name in NEAREST:
        raise UserError(f"The rule {name!r} is not provided; the nearest is {NEAREST[name]!r}.")
    if name not in ALIASES:
        raise UserError(f"Unknown solver {name!r}{nearest(name, [*REGISTRY.names(), *ALIASES])}.")
    return REGISTRY.resolve(ALIASES[name])


def find_solver(name: str, request: FitRequest) -> Solver:
    """``resolve_solver``, with a ``FittedSolver`` built for the ``request``. Raises ``UserError`` also on a missing
    file or one that does not fit the request."""
    found = resolve_solver(name)
    if isinstance(found, FittedSolver):
        rule = found.build(request)
        return Solver(rule, found.order, found.evaluations_per_step, found.paper, by_log_snr=True, name=name)
    return found


def describe_solvers() -> list[tuple[str, str, str, str, str]]:
    """Name, order, evaluations per step, paper and aliases of every solver: built in, then registered and installed."""
    solvers = {name: REGISTRY.resolve(name) for name in [*SOLVERS, *FITTED_SOLVERS, *REGISTRY.names()]}
    aliases = {name: ", ".join(alias for alias, of in ALIASES.items() if of == name) for name in solvers}
    return [(name, str(s.order), str(s.evaluations_per_step), s.paper, aliases[name]) for name, s in solvers.items()]
