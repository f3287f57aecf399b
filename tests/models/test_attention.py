"""The attention backends that run on this machine compute the same function; the others are refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_runs import settings
from torch import nn

from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import load_config, parse_config
from fewstep.distill.trainer import Trainer
from fewstep.models.attention import AttentionLayer, Backend, attention, runs, set_attention, without_cudnn
from fewstep.models.loading import load_model

CPU = torch.device("cpu")
HERE = [name for name in get_args(Backend) if runs(name, CPU)]


def test_torchs_backends_run_everywhere() -> None:
    assert {"sdpa", "math"} <= set(HERE)


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("keys", [33, 7])
def test_every_backend_computes_softmax_attention_and_its_gradient(backend: Backend, keys: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator, requires_grad=True) for n in (33, keys, keys))
    expected = (q @ k.transpose(2, 3) / 4).softmax(-1) @ v
    out = attention(q, k, v, backend)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(out.square().sum(), (q, k, v)),
        torch.autograd.grad(expected.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_set_attention_sets_the_backend_of_every_attention_layer() -> None:
    backbone = load_model("fashion").denoiser.backbone
    set_attention(backbone, "math", CPU)
    layers = [module for module in backbone.modules() if isinstance(module, AttentionLayer)]
    assert layers
    assert {layer.backend for layer in layers} == {"math"}


def test_a_network_without_attention_layers_refuses_every_backend_but_the_default() -> None:
    set_attention(nn.Linear(2, 2), "sdpa", CPU)
    with pytest.raises(UserError, match="attention: math has no effect on a Linear; remove the setting"):
        set_attention(nn.Linear(2, 2), "math", CPU)


def test_an_unavailable_backend_is_refused() -> None:
    absent = [name for name in get_args(Backend) if name not in HERE]
    if not absent:
        pytest.skip("every backend runs here")
    with pytest.raises(UserError, match=rf"{absent[0]} is not available on cpu in float32; available: sdpa"):
        set_attention(load_model("fashion").denoiser.backbone, absent[0], CPU)


def test_a_backend_is_tried_in_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, flash computes in bfloat16 but not in float32."""
    monkeypatch.setattr("fewstep.models.attention.runs", lambda name, device, dtype: dtype == torch.bfloat16)
    settings = {"out": None, "attention": "flash", "precision": "bfloat16"}
    config = load_config("configs/fashion/demo.yaml").model_copy(update=settings)
    build_inputs(config, CPU)
    with pytest.raises(UserError, match="flash is not available on cpu in float32"):
        build_inputs(config.model_copy(update={"precision": "float32"}), CPU)
    model = load_config("configs/fashion/teacher.yaml").model
    new = config.model_copy(update={"teacher": None, "model": model})
    build_inputs(new, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", get_args(Backend))
def test_backends_agree_in_bfloat16_on_a_gpu(backend: Backend) -> None:
    gpu = torch.device("cuda")
    if not runs(backend, gpu, torch.bfloat16):
        pytest.skip(f"{backend} does not run on this GPU")
    q, k, v = (torch.randn(2, 4, 256, 64, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    for context, queries in ((None, 256), (256, 256), (31, 256), (256, 8), (31, 8)):
        end = q[:, :, -queries:]
        expected = attention(end.float(), k.float(), v.float(), "math", context=context)
        out = attention(end, k, v, backend, context=context).float()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_training_leaves_cudnn_out_of_torchs_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and backward passes, which may compute a forward pass again."""
    allowed: list[tuple[str, bool]] = []

    def note(when: str, *_: object) -> None:
        allowed.append((when, torch.backends.cuda.cudnn_sdp_enabled()))

    with without_cudnn(CPU):
        note("on a CPU")
    monkeypatch.setattr("fewstep.distill.loop.without_cudnn", lambda _: without_cudnn(torch.device("cuda")))
    config = parse_config(settings("tdm", tmp_path, "cpu", "float32"), "test")
    trainer = Trainer(config, build_inputs(config, CPU), CPU)
    layer = next(iter(trainer.roles["fake"].module.parameters()))
    trainer.roles.denoiser("fake").backbone.register_forward_hook(partial(note, "forward"))
    layer.register_hook(partial(note, "backward"))
    trainer.one_step()
    note("after")
    assert set(allowed) == {("on a CPU", True), ("forward", False), ("backward", False), ("after", True)}
