"""What a run may change when it is resumed, and the record of what it did change (``resumes.jsonl``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fewstep.core.errors import UserError
from fewstep.core.json_files import read_json_lines
from fewstep.distill.config import DataConfig, PreviewConfig

MAY_CHANGE = (
    "device", "attention", "gradient_checkpointing", "compile", "cuda_graphs", "offload", "max_hours", "log_every",
    "trackers.*", "checkpoint.*", "validation.*", "health.*", "previews.*", "stages.*.steps", "stages.*.clip",
    "stages.*.roles.*.lr", "stages.*.roles.*.warmup", "stages.*.roles.*.lr_schedule",
    "stages.*.roles.*.weight_decay", "stages.*.roles.*.betas.*",
)  # fmt: skip
Changes = dict[str, tuple[Any, Any]]


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """The settings that differ, by dotted key: (before, now), None where a setting is absent."""
    old, new = dict(flat_settings(before)), dict(flat_settings(now))
    keys = [*old, *(key for key in new if key not in old)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def flat_settings(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested settings by dotted key."""
    items: Any = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield prefix, node
        return
    for key, value in items:
        yield from flat_settings(value, f"{prefix}.{key}" if prefix else str(key))


def with_current_keys(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run, of which an earlier version may have written the files, with today's keys."""
    current = dict(settings)
    if "tensorboard" in current:
        current["trackers"] = ["tensorboard"] if current.pop("tensorboard") else []
        current["previews"] = PreviewConfig().model_dump()
    if isinstance(current.get("data"), Mapping):
        current["data"] = DataConfig().model_dump(mode="json") | dict(current["data"])
    return current


def check_changes(changed: Changes, stage: int, step: int, ends: Sequence[int]) -> None:
    """Raises ``UserError`` if a run in ``stage`` may not change these settings; of later stages it may change all. Its
    ``step`` may not be after the stage's end; ``ends`` has that of each stage."""

    def allowed(key: str) -> bool:
        parts = key.split(".")
        number = int(parts[1]) if parts[0] == "stages" and len(parts) > 1 else None
        if number is not None and number != stage:
            return number > stage
        return any(fnmatchcase(key, pattern) for pattern in MAY_CHANGE)

    refused = {key: values for key, values in changed.items() if key != "out" and not allowed(key)}
    if refused:
        listed = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in refused.items())
        raise UserError(
            f"A run cannot change this when it is resumed: {listed}. It may change {', '.join(MAY_CHANGE)}, and all of "
            "a later stage. Train with these settings in another folder, or restore the run's config.yaml."
        )
    if step > ends[stage]:
        least = step - (ends[stage - 1] if stage else 0)
        raise UserError(
            f"The run is at step {step}, after the end of its stage with these settings: stages.{stage}.steps must be "
            f"at least {least}."
        )


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ``UserError`` if what a run was trained with, besides its settings, is not what it is now: the weights of
    its teacher or of another network, or the classes that labels of its data number."""
    if before["teacher_sha256"] != now["teacher_sha256"]:
        raise UserError("The run's teacher had other weights: restore them, or train in another folder.")
    for name, sha256 in before.get("networks_sha256", {}).items():
        if sha256 != now["networks_sha256"].get(name):
            raise UserError(f"networks.{name} had other weights: restore them, or train in another folder.")
    classes = before.get("class_names", now["class_names"])  # runs of earlier versions did not record them
    if classes != now["class_names"]:
        was, listed = ", ".join(classes), ", ".join(now["class_names"])
        raise UserError(
            f"The run's data had the classes {was or '(without names)'}, and has {listed or '(without names)'} now: "
            "restore them, or train in another folder."
        )


def settings_at(folder: Path, now: Mapping[str, Any], first: int, last: int) -> Mapping[str, Any]:
    """The settings of the steps after ``first`` up to ``last``, of a run whose settings are ``now``.

    Raises ``UserError`` if the run changed them in between.
    """
    settings = now
    for record in reversed(read_resumes(folder)):
        if record["step"] < last:  # what came before was trained again from here
            if record["step"] > first and record["changed"]:
                raise UserError(
                    f"The run changed {', '.join(record['changed'])} at step {record['step']}, and no checkpoint "
                    f"between that step and step {last} is left."
                )
            break
        settings = with_current_keys(record["before"])
    return settings


def read_resumes(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's resumptions, in order."""
    file = folder / "resumes.jsonl"
    return read_json_lines(file)[0] if file.is_file() else []
