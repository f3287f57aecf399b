"""The Fréchet distance of EfficientNet-Lite0 features: for natural images offline; no published number uses it."""

from __future__ import annotations

from fewstep.eval.metrics.frechet import frechet_to_reference, small_sample_bias
from fewstep.eval.metrics.metric import Metric

FD_EFFICIENTNET = Metric(
    name="fd_efficientnet", network="efficientnet", direction="lower", minimum_n=2, compute=frechet_to_reference,
    needs_reference=True, bias=small_sample_bias,
)  # fmt: skip
