"""Exporting a student to the formats of other programs."""

from __future__ import annotations

from pathlib import Path

from fewstep.api.models import Source, load
from fewstep.eval.report.tables import markdown
from fewstep.eval.score_files import read_scores
from fewstep.models.hub.export import export as export_model
from fewstep.models.hub.export_format import ExportFormat


def export(run: Source, form: ExportFormat, out: Source, device: str = "cpu") -> Path:
    """Writes a student as a diffusers pipeline, its denoiser alone (``merged``), a LoRA file, or one for ComfyUI, and
    compares what was written with the student before it gets its name. A run's config and scores go into the model
    card. Raises ``UserError`` if the model cannot be exported so."""
    folder, card = Path(run), ""
    if (folder / "config.yaml").is_file():
        card = f"## Config\n\n```yaml\n{(folder / 'config.yaml').read_text(encoding='utf-8')}```\n"
        if (folder / "eval.json").is_file():
            card += f"\n## Scores\n\n{markdown(read_scores(folder / 'eval.json'))}"
    return export_model(load(run, device), form, Path(out), card)
