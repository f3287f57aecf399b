"""Reads the motion of an object back from a clip, without a network: what ``models.emoji_clips`` draws, it recognises.

The object is what differs from the colour of the border. Its position and size in every frame give velocity, zoom and
jump; the rotation that best maps it onto the next frame gives its turning.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.models.emoji import PALETTE
from fewstep.models.emoji_clips import ALIVE, MOTIONS

DIFFERENT = 0.15 * 255  # from the background in one channel: a pixel of the object
ZOOM, SPEED, JUMP, TURN = 0.35, 0.55, 4.0, 25.0  # log of a ratio of radii; pixels per frame; pixels; degrees
ANGLES = torch.arange(-135.0, 136.0, 15.0)  # degrees
UNEXPLAINED = 0.6  # of the squared difference of two frames, which a turn must leave less than
PAIRS = 4  # of neighbouring frames, between which the turn is measured
PATCH, REACH = 20, 1.8  # pixels of a patch; half of its side, in radii of the object
SMALLEST = 4  # frames
PART = 64  # clips at a time


class MotionReading(NamedTuple):
    """What N clips of F frames show.

    ``motions`` int64 [N] are numbers of ``models.emoji_clips.MOTIONS``, ``backgrounds`` int64 [N] of
    ``models.emoji.BACKGROUNDS``; the rest is float32: ``velocity`` [N, 2] to the right and downwards, in pixels per
    frame; ``zoom`` [N], the log of the last radius over the first; ``jump`` [N], the height of the middle over that of
    the ends, in pixels; ``turn`` [N], degrees per frame in either direction; ``change`` [N], the mean difference of
    neighbouring frames, as a share of the range of pixels.
    """

    motions: Tensor
    backgrounds: Tensor
    velocity: Tensor
    zoom: Tensor
    jump: Tensor
    turn: Tensor
    change: Tensor


class ObjectTrack(NamedTuple):
    """Position [N, F, 2] (x, y in pixels) and radius [N, F] of the object of N clips."""

    centre: Tensor
    radius: Tensor


def read_motion(clips: Tensor) -> MotionReading:
    """Reads clips, uint8 [N, 3, F, H, W] with F >= 4 frames. Raises ``UserError`` on other clips.

    A motion is the first that applies: growing or shrinking, travelling, jumping, spinning; else "alive", which is also
    what a clip is called whose object stands still (its ``change`` is 0) or is not there.
    """
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < SMALLEST:
        raise UserError(
            f"Motion is read from uint8 clips [N, 3, frames, height, width] of at least {SMALLEST} frames, "
            f"got {clips.dtype} {list(clips.shape)}."
        )
    if not len(clips):
        raise UserError("There are no clips to read motion from.")
    parts = [_read(part.float()) for part in clips.split(PART)]
    return MotionReading(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _read(clips: Tensor) -> MotionReading:
    colour = background_colours(clips)
    track = track_object(clips, colour)
    velocity, zoom, jump = velocity_of(track), zoom_of(track), jump_of(track)
    turn = turn_of(clips, colour, track)
    return MotionReading(
        classify(velocity, zoom, jump, turn), torch.cdist(colour, PALETTE).argmin(1), velocity, zoom, jump, turn,
        clips.diff(dim=2).abs().mean((1, 2, 3, 4)) / 255,
    )  # fmt: skip


def classify(velocity: Tensor, zoom: Tensor, jump: Tensor, turn: Tensor) -> Tensor:
    """The rule: motions int64 [N] of these quantities, as in ``MotionReading``."""
    number = {name: k for k, name in enumerate(MOTIONS)}
    x, y = velocity.T
    sideways = torch.where(x < 0, number["left"], number["right"])
    travelling = torch.where(x.abs() > y.abs(), sideways, torch.where(y < 0, number["up"], number["down"]))
    zooming = torch.where(zoom > 0, number["growing"], number["shrinking"])
    motions = torch.where(turn >= TURN, number["spinning"], ALIVE)
    motions = torch.where(jump > JUMP, number["jumping"], motions)
    motions = torch.where(velocity.norm(dim=1) > SPEED, travelling, motions)
    return torch.where(zoom.abs() > ZOOM, zooming, motions)


def background_colours(clips: Tensor) -> Tensor:
    """The median colour of the outermost ring of pixels over all frames, float32 [N, 3], of clips [N, 3, F, H, W]."""
    ring = torch.ones(clips.shape[-2:], dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return clips[..., ring].flatten(2).float().median(2).values


def track_object(clips: Tensor, colour: Tensor) -> ObjectTrack:
    """The centroid of the pixels whose neighbourhood of 3 x 3 mostly differs from ``colour`` [N, 3], and the radius of
    a disc of equal area. Where there are none, the object is a pixel in the middle of the image."""
    height, width = clips.shape[-2:]
    different = (clips - colour[:, :, None, None, None]).abs().amax(1) > DIFFERENT
    smooth = F.avg_pool2d(different.float(), 3, 1, 1, count_include_pad=False)
    mask = (smooth > 0.5).float()
    area = mask.sum((2, 3))
    x = (mask.sum(2) * torch.arange(width)).sum(2) / area.clamp_min(1)
    y = (mask.sum(3) * torch.arange(height)).sum(2) / area.clamp_min(1)
    centre = torch.stack([x, y], 2)
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
    return ObjectTrack(torch.where(area[:, :, None] > 0, centre, middle), (area.clamp_min(1) / math.pi).sqrt())


def velocity_of(track: ObjectTrack) -> Tensor:
    """The least-squares slopes [N, 2] of the position, in pixels per frame."""
    frame = torch.arange(track.centre.shape[1], dtype=torch.float32)
    frame = frame - frame.mean()
    return (track.centre * frame[:, None]).sum(1) / frame.square().sum()


def zoom_of(track: ObjectTrack) -> Tensor:
    """The log of the mean radius of the last two frames over that of the first two, [N]."""
    return (track.radius[:, -2:].mean(1) / track.radius[:, :2].mean(1)).log()


def jump_of(track: ObjectTrack) -> Tensor:
    """How much higher the object is in the two middle frames than in the first and last, [N] in pixels."""
    y, middle = track.centre[:, :, 1], track.centre.shape[1] // 2
    return (y[:, 0] + y[:, -1]) / 2 - y[:, middle - 1 : middle + 1].mean(1)


def turn_of(clips: Tensor, colour: Tensor, track: ObjectTrack) -> Tensor:
    """The turn between neighbouring frames, [N] in degrees: the median, over four pairs, of the size of the angle that
    best maps the object of one frame, centred and scaled, onto that of the next. It has no sign, so that opposite turns
    of an ambiguous object do not cancel. It is 0 where turning hardly helps, as between frames of noise."""
    first = torch.linspace(0, clips.shape[2] - 2, PAIRS).round().long()
    objects = (clips - colour[:, :, None, None, None]) / 255
    straight = _patches(objects[:, :, first + 1], track.centre[:, first + 1], track.radius[:, first + 1], 0.0)
    errors = []
    for angle in ANGLES.tolist():
        turned = _patches(objects[:, :, first], track.centre[:, first], track.radius[:, first], angle)
        errors.append((turned - straight).square().mean((1, 2, 3)))
    least, best = torch.stack(errors, 1).min(1)
    explained = least < UNEXPLAINED * errors[int(ANGLES.abs().argmin())]
    return (ANGLES[best].abs() * explained).reshape(-1, PAIRS).quantile(0.5, dim=1)


def _patches(objects: Tensor, centre: Tensor, radius: Tensor, angle: float) -> Tensor:
    """Objects [N, C, P, H, W], turned clockwise by ``angle`` degrees around ``centre`` [N, P, 2], in patches
    [N * P, C, PATCH, PATCH] that reach ``REACH`` times the ``radius`` [N, P]."""
    height, width = objects.shape[-2:]
    size = torch.tensor([width, height])
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rotation = torch.tensor([[cosine, sine], [-sine, cosine]])
    scale = (2 * REACH * radius[:, :, None] / size)[..., None]  # positions are in [-1, 1]
    maps = torch.cat([rotation * scale, ((2 * centre + 1) / size - 1)[..., None]], 3).flatten(0, 1)
    grid = F.affine_grid(maps, [len(maps), objects.shape[1], PATCH, PATCH], align_corners=False)
    return F.grid_sample(objects.transpose(1, 2).flatten(0, 1), grid, align_corners=False)
