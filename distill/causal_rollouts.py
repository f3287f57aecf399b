"""Rollouts of causal students: videos frame by frame, as they are generated (Self-Forcing, arXiv 2506.08009).

A frame is generated from the student's own earlier frames, not from real ones, so that training meets the errors that
add up in a long video. Earlier frames reach it through the network's memory of them, which is without a graph: no
gradient flows from a frame to an earlier one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.transfer import send
from fewstep.distill.roles import Roles
from fewstep.distill.rollouts import add_noise, in_turn, initial_noise
from fewstep.distill.update import LastStep, MicroBatch, StudentSample
from fewstep.models.backbone import Past


def causal_rollout(micro: MicroBatch, roles: Roles, times: Sequence[float]) -> StudentSample:
    """For each frame in order: predict x0 from pure noise, noise it to the next time, and so on, given the frames
    before; then keep the clean frame for those after it, by an evaluation at t = 0.

    Each sample has its own last step (``in_turn``), the same for all its frames, whose x0 is the frame. The sample is
    the clip (level 0), with a graph through the last step of each frame alone. A clip of one frame is that of
    ``backward_simulation``.
    """
    schedule = roles.denoiser("student").schedule
    condition = micro.batch.condition
    last = in_turn(micro, len(times), "exit")
    t_student = torch.tensor(times, dtype=torch.float64)[last]
    frames: list[Tensor] = []
    states: list[Tensor] = []
    pasts: list[Past | None] = []
    past: Past | None = None
    for x in initial_noise(micro, schedule, times[0]).split(1, 2):
        x = x.clone()  # frames are changed in place below, and a graph keeps each
        with torch.no_grad():
            for i, (now, following) in enumerate(pairwise(times)):
                noise = micro.random.normal(x.shape, "renoise")
                rows = send((last > i).nonzero()[:, 0], x.device)
                if not len(rows):
                    continue
                before = None if past is None else tuple(tensor[rows] for tensor in past)
                p, _ = roles.after("student", before, x[rows], now, condition.index(rows))
                t = torch.full((len(rows),), following, dtype=torch.float64)
                x[rows] = add_noise(schedule, p.x0, noise[rows], t)
        p, _ = roles.after("student", past, x, t_student, condition)
        frames.append(p.x0)
        states.append(x)
        pasts.append(past)
        with torch.no_grad():
            _, past = roles.after("student", past, p.x0.detach(), 0.0, condition)

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        each = zip(x.split(1, 2), pasts, strict=True)
        return torch.cat([roles.after("student", before, frame, t, condition)[0].x0 for frame, before in each], 2)

    x0, x_s = torch.cat(frames, 2), torch.cat(states, 2)
    return StudentSample(x0, torch.zeros_like(t_student), x0, t_student, condition, last=LastStep(x_s, evaluate))


def require_causal(roles: Roles) -> None:
    """Raises ``UserError`` if the student cannot generate frame by frame in training."""
    student = roles.denoiser("student")
    if not student.causal:
        raise UserError(
            "rollout: causal needs a causal student, whose network evaluates frames one after the other; this "
            f"{type(student.backbone).__name__} does not. Train one with model.backbone.causal: true and "
            "times_per_frame: true, and start the student from it: networks: {causal: {checkpoint: RUN}} and "
            "roles.student.init: causal, with full_finetune: true in a run with adapters."
        )
    if roles.split:
        raise UserError("rollout: causal does not evaluate networks that are split over processes; set shard: false.")
