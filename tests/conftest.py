"""Settings of the whole suite: one thread a process, reproducible hypothesis, GPU tests only where there is a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import pytest
import torch
from computed_again import count_replays
from hypothesis import settings

from fewstep.core.torchvision_compat import prepare_torchvision

torch.set_num_threads(1)
settings.register_profile("fewstep", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("fewstep")
prepare_torchvision()  # an installed torchvision must not break the tests that import peft or diffusers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each replay of a recorded evaluation, which a GPU does, or what stands in for it."""
    return count_replays(monkeypatch)
