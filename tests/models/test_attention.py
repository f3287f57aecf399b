"""The attention backends that run on this machine compute one function; the others are refused by name."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fewstep.core.errors import UserError
from fewstep.models.attention import Attends, Backend, attention, runs, set_attention
from fewstep.models.loading import load_model

CPU = torch.device("cpu")
HERE = [name for name in get_args(Backend) if runs(name, CPU)]


def test_torchs_own_runs_everywhere() -> None:
    assert {"sdpa", "math"} <= set(HERE)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("keys", [33, 7])
def test_every_backend_is_softmax_attention_with_its_gradient(backend: Backend, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, n, 16, generator=generator, requires_grad=True) for n in (33, keys, keys)
    )  # fmt: skip
    expected = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v
    out = attention(q, k, v, backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_network_is_told_its_backend() -> None:
    backbone = load_model("fashion").denoiser.backbone
    set_attention(backbone, "math", CPU)
    layers = [module for module in backbone.modules() if isinstance(module, Attends)]
    assert layers
    assert {layer.backend for layer in layers} == {"math"}


def test_a_backend_that_does_not_run_here_is_refused() -> None:
    absent = [name for name in get_args(Backend) if name not in HERE]
    if not absent:
        pytest.skip("every backend runs here")
    with pytest.raises(UserError, match=rf"{absent[0]} does not run on cpu here; these do: sdpa"):
        set_attention(load_model("fashion").denoiser.backbone, absent[0], CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", get_args(Backend))
def test_on_a_gpu_in_half_precision(backend: Backend) -> None:
    gpu = torch.device("cuda")
    if not runs(backend, gpu, torch.bfloat16):
        pytest.skip(f"{backend} does not run here")
    q, k, v = (torch.randn(2, 4, 256, 64, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    expected = attention(q.float(), k.float(), v.float(), "math")
    torch.testing.assert_close(attention(q, k, v, backend).float(), expected, rtol=2e-2, atol=2e-2)
