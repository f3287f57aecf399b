"""The CLIP score (Hessel et al., arXiv 2104.08718): how well images match their captions."""

from __future__ import annotations

import torch

from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.clip import PREFIX


def clip_score(inputs: MetricInput, prefix: str) -> float:
    """The mean cosine of the embeddings of image k and caption k (modulo their number), in -1..1."""
    images, texts = inputs.images.features(), inputs.texts[prefix].cpu()
    return float((images * texts[torch.arange(len(images)) % len(texts)]).sum(1).mean())


CLIP_SCORE = Metric(
    name="clip_score", network="clip", direction="higher", minimum_n=2,
    compute=lambda inputs: clip_score(inputs, ""), needs_features=True, caption_prefix="",
)  # fmt: skip
CLIP_SCORE_DMD2 = Metric(  # as DMD2's evaluation code computes it
    name="clip_score_dmd2", network="clip", direction="higher", minimum_n=2,
    compute=lambda inputs: clip_score(inputs, PREFIX), needs_features=True, caption_prefix=PREFIX,
)  # fmt: skip
