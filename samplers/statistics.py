"""The statistics of DPM-Solver-v3 (arXiv 2310.13268, Appendix C): how a network's noise prediction follows its input.

At each log-SNR, over samples x = alpha x0 + sigma noise, with e the (guided) noise prediction and a prime for the
derivative by log-SNR along the probability-flow ODE,

    l = E[diag(sigma de/dx)]                       (estimated by sigma (J v) v with one random sign vector v per sample)
    f = (sigma e - l x) / alpha,   s = cov(f, f') / var(f),   b = E[f'] - s E[f]

The paper's code for them is not published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.core.errors import UserError
from fewstep.core.files import read_metadata, read_tensors, write_tensors
from fewstep.core.transfer import like
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance, guide
from fewstep.models.weights_hash import weights_hash
from fewstep.samplers.grids import T_MAX, T_MIN

Progress = Callable[[int, int], None]
NoiseJvp = Callable[[Tensor, Tensor, Condition, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def estimate_statistics(
    denoiser: Denoiser, x0: Tensor, condition: Condition, file: Path, *, guidance: Guidance, intervals: int = 120,
    seed: int = 0, batch: int = 128, progress: Progress | None = None,
) -> None:  # fmt: skip
    """Writes the statistics over clean samples ``x0`` [K, ...] and their conditions, at ``intervals + 1`` log-SNRs from
    that of ``T_MAX`` to that of ``T_MIN``; two Jacobian-vector products per sample and log-SNR.

    Continues an interrupted call from a file beside ``file``; raises ``UserError`` if its settings differ. ``progress``
    receives (rows done, rows in total).
    """
    first, last = denoiser.schedule.log_snr(torch.tensor([T_MAX, T_MIN], dtype=torch.float64)).tolist()
    log_snr = torch.linspace(first, last, intervals + 1, dtype=torch.float64)
    means = _SampleMeans(denoiser, x0, condition, guidance, seed, batch)
    if intervals < 1 or not len(x0):
        raise UserError(f"Statistics need at least one interval and one sample, got {intervals} and {len(x0)}.")
    settings = {"intervals": intervals, "n": len(x0), "guidance": guidance.scale, "seed": seed}
    metadata = {"settings": json.dumps(settings), "model": weights_hash(denoiser)}
    shape = tuple(x0.shape[1:])
    shapes = {"l": shape, "m": (4, *shape)}
    partial = _PartialFile(file.with_suffix(".partial.safetensors"), metadata, intervals + 1, shapes)
    l = partial.rows("l", lambda k: means.slope(log_snr[k]), progress, 0)  # noqa: E741
    l_prime = torch.gradient(l, spacing=(log_snr.float(),), dim=0, edge_order=1)[0]
    m = partial.rows("m", lambda k: means.moments(log_snr[k], l[k], l_prime[k]), progress, intervals + 1)
    f, f_prime, ff, ff_prime = m.unbind(1)
    variance = ff - f * f
    s = torch.where(variance > 1e-12 * ff, (ff_prime - f * f_prime) / variance.clamp(min=1e-30), 0.0)
    tensors = {"log_snr": log_snr, "l": l, "s": s, "b": f_prime - s * f}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError("The model's statistics are not finite: its output or derivative is not, for some log-SNR.")
    write_tensors(tensors, file, partial.metadata)
    with suppress(OSError):  # the result is complete
        partial.file.unlink()


@dataclass
class _SampleMeans:
    """Means over the samples at one log-SNR."""

    denoiser: Denoiser
    x0: Tensor
    condition: Condition
    guidance: Guidance
    seed: int
    batch: int

    def slope(self, log_snr: Tensor) -> Tensor:
        """l [...]."""
        total = torch.zeros_like(self.x0[0])
        for x, t, condition, generator in self._noisy_batches(log_snr):
            signs = 2 * torch.randint(2, x.shape, generator=generator) - 1
            v, sigma = like(x, signs, self.denoiser.schedule.sigma(t))
            _, derivative = self.jvp(x, t, condition, v, torch.zeros_like(t))
            total += (sigma * derivative * v).sum(0)
        return total / len(self.x0)

    def moments(self, log_snr: Tensor, l: Tensor, l_prime: Tensor) -> Tensor:  # noqa: E741
        """E[f], E[f'], E[f f], E[f f'] [4, ...]."""
        schedule = self.denoiser.schedule
        total = torch.zeros(4, *self.x0.shape[1:], dtype=torch.float64)
        for x, t, condition, _ in self._noisy_batches(log_snr):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            dt = 1 / (schedule.d_alpha(t) / alpha - schedule.d_sigma(t) / sigma)  # by log-SNR
            drift = schedule.d_alpha(t) / alpha * dt
            drift, alpha, sigma, slope = like(x, drift, alpha, sigma, torch.exp(-log_snr))
            e = self._noise(x, t, condition)
            _, e_prime = self.jvp(x, t, condition, drift * x - sigma * e, dt)
            f = (sigma * e - l * x) / alpha
            f_prime = slope * ((l - 1) * e + e_prime) - l_prime * x / alpha
            f, f_prime = f.double().cpu(), f_prime.double().cpu()
            total += torch.stack([f, f_prime, f * f, f * f_prime]).sum(1)
        return (total / len(self.x0)).float()

    def _noisy_batches(self, log_snr: Tensor) -> Iterator[tuple[Tensor, Tensor, Condition, torch.Generator]]:
        schedule = self.denoiser.schedule
        t = schedule.time_of_log_snr(log_snr[None])[0]
        generator = torch.Generator().manual_seed(self.seed)
        for low in range(0, len(self.x0), self.batch):
            x0 = self.x0[low : low + self.batch]
            noise = torch.randn(x0.shape, generator=generator)
            noise, alpha, sigma = like(x0, noise, schedule.alpha(t), schedule.sigma(t))
            yield alpha * x0 + sigma * noise, t, self.condition.index(slice(low, low + self.batch)), generator

    def _noise(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return guide(self.denoiser, x, t, condition, self.guidance).out.noise

    @cached_property
    def jvp(self) -> NoiseJvp:
        """The noise prediction and its derivative in a direction (dx, dt): by forward mode or, if a layer of the
        network does not support that, by two backward passes."""
        x0, condition = self.x0[:1], self.condition.index(slice(0, 1))
        half = torch.tensor(0.5, dtype=torch.float64)
        try:
            self._forward_jvp(x0, half, condition, x0, half)
        except (RuntimeError, NotImplementedError):
            return self._double_backward_jvp
        return self._forward_jvp

    def _forward_jvp(self, x: Tensor, t: Tensor, condition: Condition, dx: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        times, d_times = t.repeat(len(x)), dt.repeat(len(x))
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = self._noise(forward_ad.make_dual(x, dx), forward_ad.make_dual(times, d_times), condition)
            e, derivative = forward_ad.unpack_dual(dual)
        return e, derivative

    def _double_backward_jvp(
        self, x: Tensor, t: Tensor, condition: Condition, dx: Tensor, dt: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            x, t = x.detach().requires_grad_(), t.repeat(len(x)).requires_grad_()
            e = self._noise(x, t, condition)
            u = torch.zeros_like(e, requires_grad=True)
            by_x, by_t = torch.autograd.grad(e, (x, t), u, create_graph=True)  # linear in u, with the wanted slope
            (derivative,) = torch.autograd.grad((by_x * dx).sum() + (by_t * dt).sum(), u)
        return e.detach(), derivative


class _PartialFile:
    """The rows computed so far, in a file: up to ``count`` of each of the ``shapes``, by name."""

    def __init__(self, file: Path, metadata: dict[str, str], count: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.file, self.metadata, self._count = file, metadata, count
        self._rows: dict[str, Tensor] = {}
        if file.is_file():
            if read_metadata(file) != metadata:
                raise UserError(f"{file} belongs to statistics with other settings: delete it or choose another --out.")
            self._rows = read_tensors(file)
            for name, rows in self._rows.items():
                fits = name in shapes and rows.shape[1:] == shapes[name] and len(rows) <= count
                if not fits or rows.dtype != torch.float32 or not rows.isfinite().all():
                    raise UserError(f"{file} is damaged (its rows {name}): delete it, to measure them again.")

    def rows(self, name: str, compute: Callable[[int], Tensor], progress: Progress | None, before: int) -> Tensor:
        """All rows of ``name``; computes the missing ones and saves every ten rows. ``before``: rows of other names."""
        rows = list(self._rows.get(name, torch.zeros(0)))
        for k in range(len(rows), self._count):
            rows.append(compute(k))
            self._rows[name] = torch.stack(rows)
            if k % 10 == 9 or k + 1 == self._count:
                write_tensors(self._rows, self.file, self.metadata)
            if progress is not None:
                progress(before + k + 1, 2 * self._count)
        return self._rows[name]
