"""Every metric of a protocol by its name: of which network's features, and what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import FeatureStatistics
from fewstep.eval.metrics.cmmd import cmmd
from fewstep.eval.metrics.diversity import cross_seed_diversity, in_batch_similarity
from fewstep.eval.metrics.frechet import frechet_distance, frechet_infinity
from fewstep.eval.metrics.inception_score import inception_score
from fewstep.eval.metrics.kid import kid
from fewstep.eval.metrics.precision_recall import density_coverage, precision_recall
from fewstep.eval.networks.clip import PREFIX


@dataclass(frozen=True, eq=False)
class MetricInput:
    """What the metrics of one network are given: both sets in its features, the captions' embeddings by the prefix that
    was put before them, and how many conditions the images show in turn (0: not known)."""

    images: FeatureStatistics
    reference: FeatureStatistics | None
    texts: Mapping[str, Tensor]
    conditions: int

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Features of the real images and of these."""
        return self.real.features(), self.images.features()

    @property
    def real(self) -> FeatureStatistics:
        assert self.reference is not None
        return self.reference

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return precision_recall(*self.both)

    @cached_property
    def density_coverage(self) -> tuple[float, float]:
        return density_coverage(*self.both)

    @property
    def by_seed(self) -> Tensor:
        """Features [S, N, D] of S rounds through N conditions. Raises ``UserError`` on fewer than two rounds."""
        rows = self.images.features()
        rounds = len(rows) // self.conditions if self.conditions else 0
        if rounds < 2:
            raise UserError(f"{len(rows)} images of {self.conditions} conditions: two a condition are needed.")
        return rows[: rounds * self.conditions].reshape(rounds, self.conditions, -1)

    def clip_score(self, prefix: str) -> float:
        """The mean cosine of image k and caption k, counted round."""
        images, texts = self.images.features(), self.texts[prefix].cpu()
        return float((images * texts[torch.arange(len(images)) % len(texts)]).sum(1).mean())


class Metric(NamedTuple):
    """``network``: one of ``networks/chosen.py``. ``rows``: it needs every image's features; ``reference``: real
    images."""

    network: str
    of: Callable[[MetricInput], float]
    rows: bool = False
    reference: bool = True
    prefix: str | None = None  # of captions; None: it needs none


def frechet(s: MetricInput) -> float:
    return frechet_distance(s.images.statistics, s.real.statistics)


METRICS: dict[str, Metric] = {
    "fid": Metric("inception", frechet),
    "fid_infinity": Metric("inception", lambda s: frechet_infinity(s.images.features(), s.real.statistics), rows=True),
    "kid": Metric("inception", lambda s: kid(*s.both), rows=True),
    "precision": Metric("inception", lambda s: s.precision_recall[0], rows=True),
    "recall": Metric("inception", lambda s: s.precision_recall[1], rows=True),
    "density": Metric("inception", lambda s: s.density_coverage[0], rows=True),
    "coverage": Metric("inception", lambda s: s.density_coverage[1], rows=True),
    "inception_score": Metric(
        "inception_classes", lambda s: inception_score(s.images.features()), rows=True, reference=False
    ),
    "fd_dinov2": Metric("dinov2", frechet),
    "fd_efficientnet": Metric("efficientnet", frechet),
    "clip_fid": Metric("clip_fid", frechet),
    "cmmd": Metric("cmmd", lambda s: cmmd(*s.both), rows=True),
    "clip_score": Metric("clip", lambda s: s.clip_score(""), rows=True, reference=False, prefix=""),
    "clip_score_dmd2": Metric("clip", lambda s: s.clip_score(PREFIX), rows=True, reference=False, prefix=PREFIX),
    "similarity": Metric("clip", lambda s: in_batch_similarity(s.by_seed), rows=True, reference=False),
    "diversity": Metric("clip", lambda s: cross_seed_diversity(s.by_seed), rows=True, reference=False),
    "fvd": Metric("i3d", frechet),
}
