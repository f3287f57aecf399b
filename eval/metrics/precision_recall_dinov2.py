"""Precision, recall, density and coverage in DINOv2 features (Stein et al., arXiv 2306.04675).

They have as many neighbours as in Inception's features: 3 for precision and recall, 5 for density and coverage.
"""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.density_coverage import COVERAGE, DENSITY
from fewstep.eval.metrics.precision_recall import PRECISION, RECALL

PRECISION_DINOV2, RECALL_DINOV2, DENSITY_DINOV2, COVERAGE_DINOV2 = (
    replace(metric, name=f"{metric.name}_dinov2", network="dinov2") for metric in (PRECISION, RECALL, DENSITY, COVERAGE)
)
