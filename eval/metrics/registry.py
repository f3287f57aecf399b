"""All metrics that a protocol can name."""

from __future__ import annotations

from fewstep.core.registry import Registry
from fewstep.eval.metrics.clip_fid import CLIP_FID
from fewstep.eval.metrics.clip_score import CLIP_SCORE, CLIP_SCORE_DMD2
from fewstep.eval.metrics.cmmd import CMMD
from fewstep.eval.metrics.density_coverage import COVERAGE, DENSITY
from fewstep.eval.metrics.diversity import DIVERSITY
from fewstep.eval.metrics.fd_dinov2 import FD_DINOV2
from fewstep.eval.metrics.fd_efficientnet import FD_EFFICIENTNET
from fewstep.eval.metrics.fid import FID
from fewstep.eval.metrics.fid_infinity import FID_INFINITY
from fewstep.eval.metrics.fvd import FVD
from fewstep.eval.metrics.inception_score import INCEPTION_SCORE
from fewstep.eval.metrics.kid import KID
from fewstep.eval.metrics.kid_dinov2 import KID_DINOV2
from fewstep.eval.metrics.metric import Metric
from fewstep.eval.metrics.patch_fid import PATCH_FID
from fewstep.eval.metrics.precision_recall import PRECISION, RECALL
from fewstep.eval.metrics.precision_recall_dinov2 import (
    COVERAGE_DINOV2,
    DENSITY_DINOV2,
    PRECISION_DINOV2,
    RECALL_DINOV2,
)
from fewstep.eval.metrics.sfid import SFID
from fewstep.eval.metrics.similarity import SIMILARITY
from fewstep.eval.metrics.vendi import VENDI, VENDI_DINOV2, VENDI_PER_CONDITION_DINOV2

BUILTIN = (
    FID, FID_INFINITY, SFID, PATCH_FID, KID, PRECISION, RECALL, DENSITY, COVERAGE, VENDI, INCEPTION_SCORE, FD_DINOV2,
    KID_DINOV2, PRECISION_DINOV2, RECALL_DINOV2, DENSITY_DINOV2, COVERAGE_DINOV2, VENDI_DINOV2,
    VENDI_PER_CONDITION_DINOV2, FD_EFFICIENTNET, CLIP_FID, CMMD, CLIP_SCORE, CLIP_SCORE_DMD2, SIMILARITY, DIVERSITY,
    FVD,
)  # fmt: skip
METRICS: Registry[Metric] = Registry(
    "metric", lambda: {metric.name: metric for metric in BUILTIN}, lambda value: isinstance(value, Metric),
    "a fewstep.eval.metrics.metric.Metric",
)  # fmt: skip
