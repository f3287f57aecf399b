"""Evaluation protocols, one YAML file each: what is measured, on how many images, how prepared, against what."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fewstep.core.errors import UserError, nearest
from fewstep.core.paths import MaybePath, overlap
from fewstep.core.yaml_files import read_yaml
from fewstep.eval.captions import Captions
from fewstep.eval.hashes import json_sha256
from fewstep.eval.images import Crop, Filter, ImageSet
from fewstep.eval.metrics.metric import Metric
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.networks.inception import Mode
from fewstep.eval.references import bundled_references

PROTOCOLS = Path(__file__).parents[1] / "configs" / "eval"


class Protocol(BaseModel):
    """The settings of an evaluation.

    Args:
        reference: a bundled reference by name (which determines the metrics), or real images or files of their
            statistics, with ``{network}`` for each network's name.
        metrics: names in ``METRICS``, or dotted names of your own.
        inception: how Inception's input is resized.
        clip: the model of CLIP scores, ``MODEL:TAG`` or ``MODEL:FILE``.
        size: images are cropped to their centred square and resized to this with ``filter``.
        frames: of videos, for FVD.
        captions: a text file, one caption per line, or a table (.csv, .jsonl, .parquet) with a column caption, prompt
            or text; image k shows caption k modulo their number. A table with the columns file and caption pairs images
            on disk by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    reference: MaybePath | None = None
    metrics: tuple[str, ...] = ()
    inception: Mode = "clean"
    clip: str = "ViT-g-14:laion2b_s12b_b42k"
    n: int = Field(ge=1, le=10**9)
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0,), min_length=1)
    size: int | None = Field(None, ge=1, le=65_536)
    filter: Filter = "lanczos"
    frames: int | None = Field(None, ge=1, le=65_536)
    captions: MaybePath | None = None

    @model_validator(mode="after")
    def _check(self) -> Protocol:
        if not self.metrics and not self.uses_bundled_reference:
            raise ValueError("metrics or a bundled reference are needed")
        if self.uses_bundled_reference and (self.metrics or self.captions or self.size or self.frames):
            raise ValueError(f"the bundled reference {self.reference!r} determines metrics, captions, size and frames")
        try:
            resolved = self.resolved_metrics
        except UserError as error:  # shown with the file's name
            raise ValueError(str(error).removesuffix(".")) from error
        for name, metric in resolved.items():
            if metric.needs_reference and self.reference is None:
                raise ValueError(f"{name} needs a reference")
            if metric.caption_prefix is not None and self.captions is None:
                raise ValueError(f"{name} needs captions")
            if metric.videos and not self.frames:
                raise ValueError(f"{name} is computed from videos and needs frames")
            if self.size and self.size < metric.minimum_side:
                raise ValueError(
                    f"{name} needs images of {metric.minimum_side} pixels or more, not of size {self.size}"
                )
            if self.frames and not metric.videos:
                raise ValueError(f"{name} is computed from images; remove frames")
        if self.frames and self.size:
            raise ValueError("the network resizes videos; remove size")
        return self

    @property
    def uses_bundled_reference(self) -> bool:
        """Whether it is evaluated by ``ReferenceEvaluator``."""
        return self.reference in bundled_references()

    @property
    def resolved_metrics(self) -> dict[str, Metric]:
        """The metrics by their names in the protocol. Raises ``UserError`` on unknown names."""
        return {name: METRICS.resolve(name) for name in self.metrics}

    @property
    def crop(self) -> Crop | None:
        """How images are prepared; None leaves them unchanged."""
        return Crop(self.size, self.filter) if self.size else None

    @property
    def preparation(self) -> str:
        """How images are prepared, as files of statistics record it."""
        if self.frames:
            return f"the first {self.frames} frames"
        return f"centred square, {self.size} pixels, {self.filter}" if self.size else "unchanged"

    @property
    def sha256(self) -> str:
        """The hash of what determines the values other than files, counts and seeds."""
        clip = "a file" if Path(self.clip.partition(":")[2]).is_file() else self.clip
        return json_sha256([self.preparation, self.inception, clip])

    def read_captions(self) -> Captions | None:
        """The captions, if there are any. Raises ``UserError`` if their file is missing or damaged."""
        return Captions.read(Path(self.captions)) if self.captions is not None else None

    def check_source(self, source: Path) -> None:
        """Raises ``UserError`` if some of the images to score are the reference's, because one folder contains the
        other: subfolders belong to a set of images. All of them may be, whose distance is zero, as a check."""
        if self.reference is None or self.uses_bundled_reference:
            return
        real = Path(self.reference)
        if not (source.is_dir() and real.is_dir()) or source.samefile(real):  # statistics may lie beside images
            return
        if overlap(source, real):
            raise UserError(
                f"One of {source} and the reference {real} contains the other, so that some of the images to score are "
                "real ones: move one folder out of the other."
            )

    def open_images(self, source: Path, skip_bad: bool = False, count: int | None = None) -> ImageSet:
        """The images or videos at ``source``, prepared as the protocol requires: ``count`` of them, or all."""
        return ImageSet.open(source, self.crop, skip_bad, count, self.frames)


def bundled_protocols() -> list[str]:
    """The names of the protocols that ship with the package."""
    return sorted(file.stem for file in PROTOCOLS.glob("*.yaml"))


def load_protocol(
    name: str, *, reference: str | None = None, captions: str | None = None, n: int | None = None,
    seed: int | None = None,
) -> Protocol:  # fmt: skip
    """A bundled protocol by name, or one from a YAML file; the arguments replace its settings. Raises ``UserError``."""
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else PROTOCOLS / f"{name}.yaml"
    if not file.is_file():
        beside = sorted(map(str, file.parent.glob("*.y*ml"))) if str(file) == name else []
        raise UserError(f"No protocol {name!r}{nearest(name, [*beside, *bundled_protocols()])}.")
    settings = read_yaml(file)
    if not isinstance(settings, dict):
        raise UserError(f"{file} must contain a mapping of settings, key: value.")
    try:
        arguments = {"reference": reference, "captions": captions, "n": n, "seeds": None if seed is None else (seed,)}
        changed = {key: value for key, value in arguments.items() if value is not None}
        return Protocol.model_validate({"name": file.stem, **settings, **changed})
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])) or "protocol", first["msg"].removeprefix("Value error, ")
        raise UserError(f"{file}: {key}: {message}.") from error
