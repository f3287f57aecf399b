"""Uploading an export to the Hugging Face hub, for those who ask for it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from fewstep.core.errors import UserError

WRITING = "a token of the Hugging Face hub that may write: set HF_TOKEN, or call hf auth login."


def open_repository(name: str, private: bool) -> Any:
    """The hub's interface, after all checks that are possible without creating anything there. Raises ``UserError``
    on a name that is none, without a token that may write, and if the repository exists and is not as ``private`` as it
    should be."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push {name}: {error} Give owner/name.") from error
    if "/" not in name:
        raise UserError(f"--push {name}: whose repository? Give owner/name.")
    token = huggingface_hub.get_token()
    if token is None:
        raise UserError(f"--push needs {WRITING}")
    api = huggingface_hub.HfApi(token=token)
    with _talking(name):
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(f"The token of the Hugging Face hub may only read, and --push needs {WRITING}")
    _exists(api, name, private)
    return api


def upload(api: Any, name: str, folder: Path, private: bool) -> None:
    """Uploads a folder to a repository, which is created if it does not exist. Raises ``UserError`` if the hub
    refuses."""
    try:
        exists = _exists(api, name, private)
        with _talking(name):
            if not exists:
                api.create_repo(name, private=private)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model exported by fewstep")
    except UserError as error:
        done = f"The export is complete: upload it with hf upload {name} {shlex.quote(str(folder))}"
        raise UserError(f"{str(error).rstrip('.')}. {done}") from error


def _exists(api: Any, name: str, private: bool) -> bool:
    """Whether there is such a repository. Raises ``UserError`` if it has the other visibility: uploads change none."""
    with _talking(name):
        if not api.repo_exists(name):
            return False
        found = bool(api.repo_info(name).private)
    if found != private:
        kind, option = ("private", "without") if found else ("public", "with")
        raise UserError(
            f"The repository {name} exists and is {kind}: choose another name, or upload {option} --public."
        )
    return True


@contextmanager
def _talking(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no connection, no rights, a full disk: of the hub's HTTP library or of Python
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"The hub did not accept {name}: {first}") from error
