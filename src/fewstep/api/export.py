"""Exporting a student to the formats of other programs."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch

from fewstep.api.models import Source, checkpoint_of, config_of, load, run_of
from fewstep.core.errors import UserError
from fewstep.core.yaml_files import dump_yaml
from fewstep.distill.config_files import read_settings
from fewstep.eval.report.tables import markdown
from fewstep.eval.score_files import read_scores
from fewstep.models.hub.card import ADAPTERS
from fewstep.models.hub.export import export as export_model
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.loading import base_dtype


def export(run: Source, form: ExportFormat, out: Source, device: str = "cpu", dtype: torch.dtype | None = None) -> Path:
    """Writes a student as a diffusers pipeline, its denoiser alone (``merged``), a LoRA file, or one for ComfyUI, and
    compares what was written with the student before it gets its name. A run's config and scores go into the model
    card, without absolute paths. ``dtype`` is the type of a network's weights, by default that of the base's; adapters
    are float32. Raises ``UserError`` if the model cannot be exported so."""
    if dtype is not None and form in ADAPTERS:
        raise UserError(f"An adapter ({form}) is written in float32: leave out dtype, which is for networks.")
    folder, card = run_of(run), ""
    if folder is not None:
        config = dump_yaml(_without_folders(read_settings(folder / "config.yaml")[0]))
        card = f"## Config\n\n```yaml\n{config}```\n"
        if checkpoint_of(run) is None and (folder / "eval.json").is_file():
            card += f"\n## Scores\n\n{markdown(read_scores(folder / 'eval.json'))}"
    saved = config_of(run)
    model = load(run, device, dtype=dtype or (base_dtype(saved) if saved is not None else None))
    return export_model(model, form, Path(out), card)


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
