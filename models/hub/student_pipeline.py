"""An exported diffusers pipeline whose plain call is the student.

A pipeline's number of steps and guidance scale are defaults in the signature of its ``__call__`` (50 steps and 7.5 in
Stable Diffusion); diffusers 0.42 reads neither from any config, and passes the scheduler the number of steps without
saying whether the user chose it. So files alone cannot change them.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from fewstep.core.errors import UserError
from fewstep.core.paths import is_hub_id
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.family import Family, family_of
from fewstep.models.hub.few_step_scheduler import step_changes
from fewstep.models.hub.folder import require_diffusers
from fewstep.models.hub.manifest import Manifest, read_manifest
from fewstep.models.hub.weights import refuse_pickles


def load_pipeline(folder: str | Path, **settings: Any) -> Any:
    """The pipeline in a folder that ``fewstep export --to diffusers`` wrote, or in such a repository of the hub
    (``owner/name``, downloaded if it is not in the cache), as diffusers loads it. In its call, the
    student's number of steps and guidance off are the defaults: ``load_pipeline(folder)("a photo").images[0]``.

    ``settings`` are those of ``from_pretrained``, for example ``dtype=torch.bfloat16``. A student with several experts
    changes between them in its call, so that this call takes neither another number of steps nor a callback. Raises
    ``UserError`` if the folder is not such an export, or has weights in pickle files.
    """
    if is_hub_id(str(folder)):
        folder = _download(str(folder))
    manifest = read_manifest(Path(folder))
    if manifest is None or manifest.form is not ExportFormat.diffusers:
        raise UserError(
            f"{folder} is not an exported pipeline, written by fewstep export --to diffusers; other exports are loaded "
            "as their README.md describes."
        )
    family = family_of(manifest.pipeline)
    diffusers = require_diffusers()
    cls: Any = family.classes.get(manifest.pipeline) or getattr(diffusers, manifest.pipeline)
    for part in Path(folder).iterdir():
        refuse_pickles(part)
    pipeline = cls.from_pretrained(folder, **{"use_safetensors": True, **settings})
    defaults: dict[str, Any] = {}
    if manifest.times:
        defaults = {"num_inference_steps": len(manifest.times), family.guidance_argument: family.guidance_off}
    fixed: tuple[str, ...] = ()
    if len(manifest.boundaries) > 1 and not manifest.second_denoiser(family):
        defaults[family.step_callback] = _expert_changes(pipeline, Path(folder), manifest, family)
        fixed = ("num_inference_steps", family.step_callback)
    pipeline.__class__ = _with_defaults(cls, defaults, fixed)
    return pipeline


def _download(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name))
    except (OSError, ValueError) as error:  # offline, no such repository, no rights
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name!r} is no folder, and its download from the hub failed: {first}") from error


def _with_defaults(cls: Any, defaults: dict[str, Any], fixed: tuple[str, ...]) -> Any:
    """A subclass of a pipeline, with its name, whose call has other defaults, of which some cannot be changed."""
    signature = inspect.signature(cls.__call__)

    @functools.wraps(cls.__call__)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        given = signature.bind(self, *arguments, **named)
        for name, value in defaults.items():
            if given.arguments.setdefault(name, value) is not value and name in fixed:
                raise UserError(f"This student changes between experts after steps of its own: leave out {name}.")
        return cls.__call__(*given.args, **given.kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _expert_changes(pipeline: Any, folder: Path, manifest: Manifest, family: type[Family]) -> Any:
    """A callback of the pipeline's call that changes to the expert of the next step."""
    network, part = type(getattr(pipeline, family.part)), getattr(pipeline, family.part)
    others = manifest.network_folders(folder, family)[1:]
    experts = [part, *(network.from_pretrained(other, dtype=part.dtype) for other in others)]
    changes = step_changes(manifest.times, manifest.experts)

    def change(step: int) -> None:
        if step in changes:
            setattr(pipeline, family.part, experts[changes[step]].to(part.device))

    def after_step(pipeline: Any, step: int, timestep: Any, tensors: Any) -> Any:
        change(step)
        return tensors

    def legacy(step: int, timestep: Any, latents: Any) -> None:
        change(step)

    return after_step if family.step_callback == "callback_on_step_end" else legacy
