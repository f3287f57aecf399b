"""What several tests of commands start from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import succeeds, write_config
from worlds import write_idx


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 12 steps, trained by the command."""
    folder = tmp_path_factory.mktemp("cli")
    printed = succeeds("train", write_config(folder))
    assert "Trained 12 steps" in printed
    assert ("the best in validation" in printed) == (folder / "run" / "best").exists()
    return folder / "run"


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference of 8 x 8 images, written by the command from idx files."""
    folder = tmp_path_factory.mktemp("squares")
    numbers = torch.Generator().manual_seed(0)
    for split, n in (("train", 200), ("test", 100)):
        labels = torch.arange(n) % 10
        images = (torch.randint(0, 128, (n, 8, 8), generator=numbers) + 12 * labels[:, None, None]).to(torch.uint8)
        write_idx(folder, images, labels.to(torch.uint8), split)
    assert "test_accuracy" in succeeds("data", "reference", folder, "--out", folder / "squares", "--epochs", 1)
    return folder / "squares"
