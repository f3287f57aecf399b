"""The CLIP score (Hessel et al., arXiv 2104.08718): how well images match their captions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.networks.clip import PREFIX


def cosines(inputs: MetricInput, prefix: str) -> Tensor:
    """The cosines [N], in -1..1, of the embeddings of image k and caption k (modulo their number)."""
    images, texts = inputs.images.features(), inputs.texts[prefix].cpu()
    return (images * texts[torch.arange(len(images)) % len(texts)]).sum(1).double()


def mean_cosine(inputs: MetricInput, prefix: str) -> float:
    return float(cosines(inputs, prefix).mean())


def mean_cosine_error(inputs: MetricInput, prefix: str) -> float:
    """The standard error of the mean over images."""
    return float(cosines(inputs, prefix).std() / inputs.images.statistics.count**0.5)


CLIP_SCORE = Metric(
    name="clip_score", network="clip", direction="higher", minimum_n=2, needs_features=True, caption_prefix="",
    compute=partial(mean_cosine, prefix=""), error=partial(mean_cosine_error, prefix=""),
    error_of="standard error of the mean over images", computation="cosine of image and caption",
)  # fmt: skip
CLIP_SCORE_DMD2 = replace(  # as DMD2's evaluation code computes it
    CLIP_SCORE, name="clip_score_dmd2", caption_prefix=PREFIX,
    compute=partial(mean_cosine, prefix=PREFIX), error=partial(mean_cosine_error, prefix=PREFIX),
    computation=f"cosine of image and caption, which follows '{PREFIX.strip()}'",
)  # fmt: skip
