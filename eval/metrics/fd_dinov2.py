"""FD-DINOv2, the Fréchet distance of DINOv2 features (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import bias_note, frechet_to_reference
from fewstep.eval.metrics.metric import Metric

FD_DINOV2 = Metric(
    name="fd_dinov2", network="dinov2", direction="lower", minimum_n=2, compute=frechet_to_reference,
    needs_reference=True, note=bias_note,
)  # fmt: skip
