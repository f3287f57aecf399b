"""Evaluation protocols: what is measured, on how many images, prepared how, against what. One YAML file each."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from fewstep.core.errors import UserError, nearest
from fewstep.core.files import read_prompts
from fewstep.eval.images import Crop, Filter, ImageSet
from fewstep.eval.metrics.registry import METRICS, Metric
from fewstep.eval.networks.inception import Mode
from fewstep.eval.references import references

PROTOCOLS = Path(__file__).parents[1] / "configs" / "eval"


class Protocol(BaseModel):
    """``reference``: an embedded reference by name (which has metrics of its own), or files of real images or their
    statistics, ``{network}`` standing for each network's name. ``size``: images are cropped to their centred square and
    resized to it with ``filter``. ``frames``: of videos, which only FVD looks at. ``captions``: a text file, one a
    line; image k shows caption k, counted round.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    reference: str | None = None
    metrics: tuple[str, ...] = ()
    inception: Mode = "clean"
    clip: str = "ViT-g-14:laion2b_s12b_b42k"
    n: PositiveInt
    seeds: tuple[int, ...] = (0,)
    size: PositiveInt | None = None
    filter: Filter = "lanczos"
    frames: PositiveInt | None = None
    captions: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Protocol:
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}{nearest(name, METRICS)}")
        if not self.metrics and not self.bundled:
            raise ValueError("metrics are needed, or an embedded reference")
        if self.bundled and (self.metrics or self.captions or self.size or self.frames):
            raise ValueError(f"the embedded reference {self.reference!r} has metrics and conditions of its own")
        for name in self.metrics:
            if METRICS[name].reference and self.reference is None:
                raise ValueError(f"{name} needs a reference")
            if METRICS[name].prefix is not None and self.captions is None:
                raise ValueError(f"{name} needs captions")
            if (METRICS[name].network == "i3d") != bool(self.frames):
                raise ValueError(
                    f"{name} is of {'images: take frames out' if self.frames else 'videos: it needs frames'}"
                )
        if self.frames and self.size:
            raise ValueError("videos are resized by the network: take size out")
        return self

    @property
    def bundled(self) -> bool:
        return self.reference in references()

    @property
    def chosen(self) -> list[Metric]:
        return [METRICS[name] for name in self.metrics]

    @property
    def rows(self) -> frozenset[str]:
        """The networks whose features are kept for every image."""
        return frozenset(metric.network for metric in self.chosen if metric.rows)

    @property
    def crop(self) -> Crop | None:
        return Crop(self.size, self.filter) if self.size else None

    def read_captions(self) -> list[str]:
        """None, if it has no file of them. Raises ``UserError`` if that is missing."""
        if self.captions is None:
            return []
        if not Path(self.captions).is_file():
            raise UserError(
                f"The captions {self.captions} are not there: name a text file, one a line, with --captions."
            )
        return read_prompts(Path(self.captions))

    def images(self, source: Path, skip_bad: bool = False, most: int | None = None) -> ImageSet:
        """Images on disk, prepared as it wants them."""
        return ImageSet.open(source, self.crop, skip_bad, most, self.frames)


def protocols() -> list[str]:
    return sorted(file.stem for file in PROTOCOLS.glob("*.yaml"))


def load_protocol(
    name: str, *, reference: str | None = None, captions: str | None = None, n: int | None = None,
    seed: int | None = None,
) -> Protocol:  # fmt: skip
    """One that ships, by name, or a YAML file; what is given takes the place of its own. Raises ``UserError``."""
    file = Path(name) if Path(name).suffix in (".yaml", ".yml") else PROTOCOLS / f"{name}.yaml"
    if not file.is_file():
        raise UserError(f"No protocol {name!r}{nearest(name, protocols())}.")
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        given = {"reference": reference, "captions": captions, "n": n, "seeds": None if seed is None else (seed,)}
        changed = {key: value for key, value in given.items() if value is not None}
        return Protocol.model_validate({"name": file.stem, **settings, **changed})
    except (yaml.YAMLError, TypeError) as error:
        raise UserError(f"{file} is no YAML of settings ({error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{file}: {'.'.join(map(str, first['loc'])) or 'protocol'}: {first['msg'].removeprefix('Value error, ')}."
        ) from error
