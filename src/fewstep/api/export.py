"""Exporting a student to the formats of other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from PIL import Image

from fewstep.api.hub import open_repository, upload
from fewstep.api.models import Source, checkpoint_of, config_of, load, run_of
from fewstep.core.errors import UserError, nearest
from fewstep.core.files import read_prompts, require_empty
from fewstep.core.image_grid import image_grid
from fewstep.core.yaml_files import dump_yaml
from fewstep.distill.run_folder import run_settings
from fewstep.eval.report.tables import markdown
from fewstep.eval.score_files import read_scores
from fewstep.models.hub.card import ADAPTERS, CardContent
from fewstep.models.hub.encoded import ENCODERS, PROMPTS
from fewstep.models.hub.export import export as export_model
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.loading import Model, base_dtype, pipeline_of, resolve_path
from fewstep.samplers.generate import ImageGenerator
from fewstep.samplers.plan import SamplingConfig

SMALL, GRID = 64, 768  # pixels: images that are enlarged, and the longest side of the grid on a card


def export(
    run: Source, form: ExportFormat | str, out: Source, device: str = "cpu", dtype: torch.dtype | None = None, *,
    samples: int = 8, push: str | None = None, private: bool = True,
) -> Path:  # fmt: skip
    """Writes a student as a diffusers pipeline, its denoiser alone (``merged``), a LoRA file, or one for ComfyUI, and
    compares what was written with the student before it gets its name. ``dtype`` is the type of a network's weights, by
    default that of the base's; adapters are float32.

    The model card has a run's config and scores, without absolute paths, and images of ``samples`` of its prompts from
    seed 0, if the pipeline can encode prompts. ``push``: a repository on the Hugging Face hub (``owner/name``) to
    upload the folder to, with the token of the environment. If it does not exist it is created ``private``, when the
    export is complete; if it exists, it must be as ``private``.

    Raises ``UserError`` if the model cannot be exported so and, before any work, if the token, the repository or
    ``out`` does not allow it.
    """
    form = _format(form)
    if dtype is not None and form in ADAPTERS:
        raise UserError(f"An adapter ({form}) is written in float32: leave out dtype, which is for networks.")
    require_empty(Path(out))
    saved = config_of(run)
    if saved is not None and not saved.takes_prompts:
        folder = resolve_path(run)
        where = folder if (folder / "config.json").is_file() else "the student folder of the finished run"
        raise UserError(
            f"{run} is not the student of a diffusers pipeline, and only such students are exported. To use it "
            f"elsewhere, copy {where} (config.json, model.safetensors), which fewstep.load reads."
        )
    api = open_repository(push, private) if push is not None else None
    model = load(run, device, dtype=dtype or (base_dtype(saved) if saved is not None else None))
    written = export_model(model, form, Path(out), _card(model, run, samples, push or "."))
    if api is not None and push is not None:
        upload(api, push, written, private)
    return written


def _format(name: str) -> ExportFormat:
    if name not in list(ExportFormat):
        raise UserError(f"{name!r} is no format of exports{nearest(name, list(ExportFormat))}.")
    return ExportFormat(name)


def _card(model: Model, source: Source, samples: int, at: str) -> CardContent:
    """What a run contributes to the card of its student; of another model, only where it will be found."""
    if (run := run_of(source)) is None:
        return CardContent(at=at)
    settings = run_settings(run)
    config = dump_yaml(_without_folders(settings))
    text = f"## Training\n\n`fewstep train config.yaml`, with\n\n```yaml\n{config}```\n"
    if checkpoint_of(source) is None and (run / "eval.json").is_file():
        text += f"\n## Scores\n\n{markdown(read_scores(run / 'eval.json'))}"
    methods = [name for stage in settings.get("stages") or [] if (name := _objective(stage.get("objective")))]
    prompts = _prompts(model, settings, samples)
    return CardContent(text, tuple(dict.fromkeys(methods)), _images(model, prompts), tuple(prompts), at)


def _objective(objective: Any) -> str | None:
    """The name of an objective in a config: a text, or settings with a ``name``; None without one."""
    name = objective.get("name") if isinstance(objective, dict) else objective
    return name if isinstance(name, str) else None


def _prompts(model: Model, settings: dict[str, Any], count: int) -> list[str]:
    """``count`` of a student's training prompts, spread over all; none if they, or the text encoders, are missing."""
    file = Path(str((settings.get("data") or {}).get("path"))) / PROMPTS
    encodes = any(pipeline_of(model).has_component(name) for name in ENCODERS)
    if not (model.config.few_step and encodes and file.is_file() and file.stat().st_size):
        return []
    prompts = read_prompts(file)
    count = min(count, len(prompts))
    return [prompts[k * len(prompts) // count] for k in range(count)]


def _images(model: Model, prompts: Sequence[str]) -> Image.Image | None:
    """A small grid of the student's images (of videos the first frames), one per prompt, from seed 0."""
    if not prompts:
        return None
    images = ImageGenerator(model, prompts)(range(len(prompts)), SamplingConfig())
    images = images[:, 0] if images.ndim == 5 else images
    grid = image_grid(images, columns=4, scale=2 if images.shape[-1] <= SMALL else 1, gap=4)
    grid.thumbnail((GRID, GRID))
    return grid


def _without_folders(value: Any) -> Any:
    """``value`` with each absolute path in it replaced by its last part; they may contain spaces."""
    if isinstance(value, dict):
        return {key: _without_folders(content) for key, content in value.items()}
    if isinstance(value, list):
        return [_without_folders(content) for content in value]
    if not isinstance(value, str):
        return value
    local = value.startswith("~") or PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return PureWindowsPath(value).name if local else value
