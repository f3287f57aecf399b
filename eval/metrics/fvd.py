"""FVD, the Fréchet distance of I3D features of videos (Unterthiner et al., arXiv 1812.01717)."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import frechet_to_reference, small_sample_bias
from fewstep.eval.metrics.metric import Metric

FVD = Metric(
    name="fvd", network="i3d", direction="lower", minimum_n=2, compute=frechet_to_reference, needs_reference=True,
    videos=True, bias=small_sample_bias,
)  # fmt: skip
