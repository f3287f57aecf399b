"""Experiment trackers (TensorBoard, W&B, MLflow, ...) through ``accelerate.tracking``. One process has them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable
from uuid import uuid4

import numpy as np
from PIL import Image

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import write_text
from fewstep.core.json_files import read_json_object

PROJECT = "fewstep"
CONTINUED = ("tensorboard", "wandb")  # in these a resumed run is the same run, by its identity in trackers.json


@runtime_checkable
class ImageTracker(Protocol):
    """A tracker of accelerate that takes images too."""

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None: ...


def check_names(names: Sequence[str]) -> None:
    """Raises ``ValueError`` on a name that accelerate does not know, or that is there twice."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS  # slow to import

    for number, name in enumerate(names):
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"unknown tracker {name!r}{nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name in names[:number]:
            raise ValueError(f"{name} is listed twice")


def check_installed(names: Sequence[str]) -> None:
    """Raises ``UserError`` if the package of a tracker is missing. Each of accelerate's own is named as its tracker."""
    from accelerate import tracking

    for name in names:
        own = tracking.LOGGER_TYPE_TO_CLASS[name].__module__ == tracking.__name__
        if own and find_spec(name) is None:
            package = "'fewstep[tensorboard]'" if name == "tensorboard" else name.replace("_", "-")
            raise UserError(f"trackers: {name} needs a package: pip install {package}. Or remove it from the list.")


@dataclass
class Trackers:
    """The running trackers of a run, by name. One that fails in training receives nothing more, and ``warn`` is called
    once: training goes on."""

    warn: Callable[[str], None]
    running: dict[str, Any] = field(default_factory=dict)

    def start(self, names: Sequence[str], folder: Path, step: int, config: Mapping[str, Any]) -> Self:
        """Starts trackers for the run in ``folder``, whose next log line comes after ``step``. ``config`` maps dotted
        keys to scalars; a tracker receives it once per run. Raises ``UserError`` if a tracker does not start."""
        if not names:
            return self
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        check_installed(names)
        PartialState(cpu=config.get("device") == "cpu")  # their log messages need it
        file = folder / "trackers.json"
        begun = read_json_object(file) if file.is_file() else {}
        for name in names:
            identity = str(begun.get(name, uuid4().hex))
            try:
                tracker = _create(LOGGER_TYPE_TO_CLASS[name], name, folder, identity, step)
                tracker.start()
                if name not in begun:
                    tracker.store_init_configuration(dict(config))
            except Exception as error:  # whatever the package raises
                self.finish()
                raise UserError(
                    f"The tracker {name} does not start: {str(error) or type(error).__name__}. "
                    "Correct that, or remove it from trackers."
                ) from error
            self.running[name] = tracker
            if name in CONTINUED:
                begun[name] = identity
        if begun:
            write_text(json.dumps(begun, indent=2) + "\n", file)
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the numbers of a step."""
        self._each(lambda name, tracker: tracker.log(dict(values), step=step))

    def log_image(self, step: int, name: str, image: Image.Image) -> None:
        """Logs an image, on white, where a tracker takes images."""
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        pixels = np.asarray(page.convert("RGB"))
        self._each(lambda kind, tracker: _log_image(tracker, kind, {name: pixels}, step))

    def finish(self) -> None:
        """Ends all trackers, which sends what they hold."""
        self._each(lambda name, tracker: tracker.finish())
        self.running.clear()

    def _each(self, action: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self.running.items()):
            try:
                action(name, tracker)
            except Exception as error:  # whatever the package raises
                del self.running[name]
                text = str(error) or type(error).__name__
                self.warn(f"The tracker {name} failed and receives nothing more; metrics.jsonl has all numbers: {text}")


def _create(kind: Any, name: str, folder: Path, identity: str, step: int) -> Any:
    """A tracker that has not started. TensorBoard's events after ``step``, of a run that went further before it was
    resumed, are replaced; W&B continues the run with this identity and ignores steps that it has."""
    if name == "tensorboard":
        return kind(name, str(folder), purge_step=step + 1 if step else None)
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", PROJECT)
        return kind(project, name=folder.resolve().name, id=identity, resume="allow", dir=str(folder))
    return kind(PROJECT, str(folder)) if kind.requires_logging_directory else kind(PROJECT)


def _log_image(tracker: Any, kind: str, values: dict[str, Any], step: int) -> None:
    """Logs images uint8 [H, W, 3] by name, in the form that the tracker takes: each class of accelerate has its own."""
    if not isinstance(tracker, ImageTracker):
        return
    if kind == "tensorboard":
        tracker.log_images({name: pixels[None] for name, pixels in values.items()}, step, dataformats="NHWC")
    elif kind in ("aim", "clearml"):
        tracker.log_images(values, step)
    else:
        tracker.log_images({name: [pixels] for name, pixels in values.items()}, step)
