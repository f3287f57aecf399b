"""What stands in for CUDA graphs on a host: it computes again, in place, what it recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.models import cuda_graphs


def count_replays(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Without a GPU, replaces recordings. The list gets one entry for each replay."""
    replays: list[bool] = []
    record = cuda_graphs.record if torch.cuda.is_available() else compute_again

    def counted(work: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[Callable[[], None], Any]:
        replay, result = record(work, device, pool)

        def again() -> None:
            replays.append(True)
            replay()

        return again, result

    monkeypatch.setattr(cuda_graphs, "record", counted)
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_graphs, "warm_up", twice)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr("fewstep.distill.stage_checks.require_gpu", lambda config, device: None)
    return replays


def compute_again(
    work: Callable[[], Sequence[Tensor | None]], device: torch.device, pool: Any = None
) -> tuple[Callable[[], None], Any]:
    """Whether there is a graph, and what is cast, is as it was when it was recorded."""
    graph, cast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    result = work()

    def replay() -> None:
        with torch.set_grad_enabled(graph), torch.autocast("cpu", torch.bfloat16, enabled=cast):
            new = work()
        for old, other in zip(result, new, strict=True):
            if old is not None:
                assert other is not None
                old.detach().copy_(other.detach())

    return replay, result


def twice(work: Callable[[], object], device: torch.device) -> None:
    work()
    work()
