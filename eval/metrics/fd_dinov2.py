"""FD-DINOv2, the Fréchet distance of DINOv2 features (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import frechet_to_reference, small_sample_bias
from fewstep.eval.metrics.metric import Metric

FD_DINOV2 = Metric(
    name="fd_dinov2", network="dinov2", direction="lower", minimum_n=2, compute=frechet_to_reference,
    needs_reference=True, bias=small_sample_bias,
)  # fmt: skip
