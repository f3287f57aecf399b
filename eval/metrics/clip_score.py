"""The CLIP score (Hessel et al., arXiv 2104.08718): how well images match their captions."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.clip import PREFIX


def cosines(inputs: MetricInput, prefix: str) -> Tensor:
    """The cosines [N], in -1..1, of the embeddings of image k and caption k (modulo their number)."""
    images, texts = inputs.images.features(), inputs.texts[prefix].cpu()
    return (images * texts[torch.arange(len(images)) % len(texts)]).sum(1).double()


def _metric(name: str, prefix: str) -> Metric:
    return Metric(
        name=name, network="clip", direction="higher", minimum_n=2, needs_features=True, caption_prefix=prefix,
        compute=lambda inputs: float(cosines(inputs, prefix).mean()),
        error=lambda inputs: float(cosines(inputs, prefix).std()) / inputs.images.statistics.count**0.5,
        error_of="standard error of the mean over images",
        computation="cosine of image and caption" + (f", which follows '{prefix.strip()}'" if prefix else ""),
    )  # fmt: skip


CLIP_SCORE = _metric("clip_score", "")
CLIP_SCORE_DMD2 = _metric("clip_score_dmd2", PREFIX)  # as DMD2's evaluation code computes it
