"""``fewstep.json`` of an export: what it is, what it belongs to, and how it is sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from fewstep.core.files import reading
from fewstep.models.hub.export_format import ExportFormat
from fewstep.models.hub.family import Family
from fewstep.models.model_config import FewStep

MANIFEST = "fewstep.json"


class Manifest(BaseModel):
    """``fewstep.json``. ``base`` is the hub id or the folder's name of the pipeline and ``base_sha256`` the hash of its
    denoiser's weights; ``network`` is the class of the denoiser, ``shape`` that of a latent. ``scheduler`` is the class
    of the one in ``scheduler/``. ``boundaries``: the lowest times of the experts, if there are several."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    format: Literal["fewstep-export"] = "fewstep-export"
    form: ExportFormat
    pipeline: str
    network: str
    base: str
    base_sha256: str
    shape: tuple[int, ...]
    lora_scale: float = 1.0
    scheduler: str | None = None
    num_inference_steps: int | None = None
    times: tuple[float, ...] = ()
    rule: Literal["renoise", "deterministic"] | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    boundaries: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _can_be_sampled(self) -> Self:
        _ = self.few_step  # raises ValueError on wrong times
        return self

    @property
    def few_step(self) -> FewStep | None:
        """How the student is sampled; None for a model that is not a student."""
        if self.rule is None:
            return None
        return FewStep(times=self.times, rule=self.rule, shift=self.shift or 1.0)

    @property
    def experts(self) -> tuple[int, ...]:
        """The index of the expert for each time."""
        return tuple(sum(t < low for low in self.boundaries) for t in self.times)

    def content(self) -> dict[str, Any]:
        """What is written: the settings that apply."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value not in (None, [])}

    def second_denoiser(self, family: Family | type[Family]) -> str:
        """The component of the pipeline for the second of two experts, if its class has one; otherwise empty."""
        native = self.form is ExportFormat.diffusers and bool(family.two_experts) and len(self.boundaries) == 2
        return f"{family.part}_2" if native else ""

    def network_folders(self, root: Path, family: Family | type[Family]) -> list[Path]:
        """The folders of the networks of all experts."""
        others = [root / expert_name(k) for k in range(1, len(self.boundaries))]
        if self.form is ExportFormat.diffusers:
            second = self.second_denoiser(family)
            return [root / family.part, *([root / second] if second else others)]
        return [root / expert_name(0), *others] if others else [root]


def expert_name(number: int) -> str:
    """The name of the files or the folder of an expert, counted from 0."""
    return f"expert_{number + 1}"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of an export; None if the folder is not one. Raises ``UserError`` if it is damaged."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    with reading(file, "manifest of an export", "It is damaged, or from an earlier version: export the student again."):
        return Manifest.model_validate_json(file.read_bytes())
