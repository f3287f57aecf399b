"""Videos frame by frame, each frame by any solver given the frames before it (Self-Forcing, arXiv 2506.08009).

A causal network keeps what it needs of clean earlier frames. With a limited context this does not grow, so that a frame
costs the same wherever it is, and a video can be longer than those of training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.models.backbone import Backbone, Past
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.samplers.predictor import Predictor


class NextFrames(nn.Module):
    """A causal network as a backbone of the frames that follow those kept so far."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network
        self._past: Past | None = None
        self._with_last: Past | None = None

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out, self._with_last = self.network.after(self._past, x_t, t, condition)
        return out

    def keep(self) -> None:
        """From now on the frames evaluated last come before the next ones."""
        self._past = self._with_last


def sample_frames(predict: Predictor, sample: Callable[[], Tensor], frames: int) -> Tensor:
    """A video [B, C, frames, H, W], on the CPU, of frames [B, C, 1, H, W] that ``sample`` returns in turn. Within it
    ``predict``, of a causal network, follows the frames before, which it has seen at t = 0."""
    whole = predict.denoiser
    assert isinstance(whole.backbone, Backbone)
    following = NextFrames(whole.backbone)
    predict.denoiser = Denoiser(following, whole.schedule, whole.kind, style=whole.style)
    predict.denoiser.precision = whole.precision
    video = []
    for _ in range(frames):
        frame = sample()
        predict(frame, 0.0)
        following.keep()
        video.append(frame.cpu())
    predict.denoiser = whole
    return torch.cat(video, 2)
