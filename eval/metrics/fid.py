"""FID, the Fréchet distance of Inception features (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import frechet_error_to_reference, frechet_to_reference, small_sample_bias
from fewstep.eval.metrics.jackknife import ERROR_OF
from fewstep.eval.metrics.metric import Metric

FID = Metric(
    name="fid", network="inception", direction="lower", minimum_n=2, compute=frechet_to_reference,
    needs_reference=True, needs_groups=True, error=frechet_error_to_reference, error_of=ERROR_OF,
    bias=small_sample_bias, computation="Fréchet distance of Gaussian fits",
)  # fmt: skip
