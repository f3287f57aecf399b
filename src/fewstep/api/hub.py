"""Uploading an export to the Hugging Face hub, for those who ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from fewstep.core.errors import UserError


def open_repository(name: str, private: bool) -> Any:
    """The hub's interface, with a repository of this name, which is created if it does not exist. Raises ``UserError``
    without a token, on a name that is none, if the hub refuses, and if it is public but should be ``private``."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error} Give owner/name.") from error
    if "/" not in name:
        raise UserError(f"--push {name}: whose repository? Give owner/name.")
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(
            "--push needs a token of the Hugging Face hub that may write: set HF_TOKEN, or call hf auth login."
        )
    api = huggingface_hub.HfApi(token=token)
    with _talking(name):
        api.create_repo(name, private=private, exist_ok=True)
        public = not api.repo_info(name).private
    if private and public:
        raise UserError(f"The repository {name} exists and is public: choose another name, or upload with --public.")
    return api


def upload(api: Any, name: str, folder: Path) -> None:
    """Uploads a folder. Raises ``UserError`` if the hub refuses."""
    with _talking(name):
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model exported by fewstep")


@contextmanager
def _talking(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no connection, no rights, a full disk: of the hub's HTTP library or of Python
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"The hub did not accept {name}: {first}") from error
