"""FID, the Fréchet distance of Inception features (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import bias_note, frechet_to_reference
from fewstep.eval.metrics.metric import Metric

FID = Metric(
    name="fid", network="inception", direction="lower", minimum_n=2, compute=frechet_to_reference,
    needs_reference=True, note=bias_note,
)  # fmt: skip
