"""Uploads that cannot begin, and what the page of the app says about clips."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch

from fewstep.api.app import Result
from fewstep.api.app_page import figure
from fewstep.api.hub import open_repository
from fewstep.core.errors import UserError


class NoConnectionError(Exception):
    """As those of the HTTP library of huggingface_hub, which are no ``OSError``."""


def fails(*arguments: object, **named: object) -> None:
    raise NoConnectionError("Connection refused")


def test_without_a_connection_an_upload_ends_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "none")
    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", fails)
    with pytest.raises(UserError, match=r"did not accept me/student: Connection refused"):
        open_repository("me/student", private=True)
    with pytest.raises(UserError, match="Give owner/name"):
        open_repository("student", private=True)


def test_the_cost_of_a_clip_is_not_that_of_an_image() -> None:
    clips = torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8)
    assert "4 network evaluations per video" in figure(Result("Model", clips, 1.0, 4, 1.0), ["x"], 0)
    assert "4 network evaluations per image" in figure(Result("Model", clips[:, 0], 1.0, 4, 1.0), ["x"], 0)
