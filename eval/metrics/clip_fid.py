"""CLIP-FID, the Fréchet distance of CLIP image embeddings (Kynkäänniemi et al., arXiv 2203.06026)."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import frechet_to_reference, small_sample_bias
from fewstep.eval.metrics.metric import Metric

CLIP_FID = Metric(
    name="clip_fid", network="clip_fid", direction="lower", minimum_n=2, compute=frechet_to_reference,
    needs_reference=True, bias=small_sample_bias,
)  # fmt: skip
