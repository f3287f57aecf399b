"""Files of samples: safetensors with noise and images, preference pairs, or images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.core.image_files import to_unit
from fewstep.distill.data.sources import Stored

PACKAGE = Path(__file__).resolve().parents[2]


def read_stored(file: Path, classes: int) -> Stored:
    """A safetensors file with ``labels`` [N], which 0 ``classes`` do not need, and other tensors [N, ...]; uint8
    ``images`` become ``x0`` in [-1, 1].

    A path that does not exist may name a file of the package (``eval/reference/fashion/real.safetensors``). Raises
    ``UserError`` if it does not, or if the file's contents are wrong.
    """
    found = next((path for path in (file, PACKAGE / file) if path.is_file()), None)
    if found is None:
        raise UserError(
            f"data.path = {file} was not found. fewstep data ode-pairs and fewstep data preferences create such files."
        )
    tensors = read_tensors(found)
    if "images" in tensors:
        tensors["x0"] = to_unit(tensors.pop("images"))
    labels = tensors.pop("labels", None)
    if not classes and tensors:
        labels = torch.zeros(next(iter(tensors.values())).shape[:1], dtype=torch.int64)
    shapes = {tensor.shape for tensor in tensors.values()}
    if labels is None or labels.ndim != 1 or len(shapes) != 1 or next(iter(shapes))[:1] != labels.shape:
        raise UserError(
            f"{file} must contain labels and samples, equally many and all of one shape. Create it with fewstep data."
        )
    if not len(labels) or labels.is_floating_point() or labels.is_complex() or not all_finite(tensors.values()):
        raise UserError(f"{file} needs at least one sample, labels that are integers, and finite, real samples.")
    if classes and not ((labels >= 0) & (labels < classes)).all():
        raise UserError(f"{file} has labels outside 0..{classes - 1}, the classes of the model.")
    return Stored({name: tensor.float() for name, tensor in tensors.items()}, labels.long(), classes)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(not tensor.is_complex() and bool(tensor.isfinite().all()) for tensor in tensors)
