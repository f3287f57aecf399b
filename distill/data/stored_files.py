"""Files of samples: safetensors with noise and images, preference pairs, or images, and their labels or prompts.

Prompts are ``captions``, a list in the file's metadata, and ``prompt``, int64 [N], the number of each sample's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.files import read_metadata, read_tensors, reading, write_tensors
from fewstep.core.image_files import to_unit
from fewstep.distill.data.sources import Stored
from fewstep.models.condition import LabelRows
from fewstep.models.vocabulary import Vocabulary, WordPrompts

PACKAGE = Path(__file__).resolve().parents[2]
CREATE = "Create it with fewstep data."


def write_stored(file: Path, tensors: Mapping[str, Tensor], conditions: Tensor, captions: Sequence[str] = ()) -> None:
    """Writes samples [N, ...] with ``conditions``, int64 [N]: their labels, or the numbers of their ``captions``.
    Raises ``UserError`` as ``write_tensors`` does."""
    if captions:
        write_tensors({**tensors, "prompt": conditions}, file, {"captions": json.dumps(list(captions))})
    else:
        write_tensors({**tensors, "labels": conditions}, file)


def read_stored(file: Path, classes: int, vocabulary: Vocabulary | None = None) -> Stored:
    """The samples of a file: tensors [N, ...], of which uint8 ``images`` become ``x0`` in [-1, 1], and ``labels`` [N],
    which 0 ``classes`` do not need, or for a model with a ``vocabulary`` prompts.

    A path that does not exist may name a file of the package (``eval/reference/fashion/real.safetensors``). Raises
    ``UserError`` if it does not, if the file's contents are wrong, or if a caption has a word that the model lacks.
    """
    found = next((path for path in (file, PACKAGE / file) if path.is_file()), None)
    if found is None:
        raise UserError(
            f"data.path = {file} was not found. fewstep data ode-pairs and fewstep data preferences create such files."
        )
    tensors = read_tensors(found)
    if (images := tensors.pop("images", None)) is not None:
        if images.dtype != torch.uint8:
            raise UserError(f"{file}: images must be uint8, 0..255, got {images.dtype}; in [-1, 1] they are called x0.")
        tensors["x0"] = to_unit(images)
    captions = stored_captions(found) if vocabulary is not None else []
    kind, limit = ("labels", classes) if vocabulary is None else ("prompt", len(captions))
    numbers = tensors.pop(kind, None)
    if not limit and tensors:
        numbers = torch.zeros(next(iter(tensors.values())).shape[:1], dtype=torch.int64)
    shapes = {tensor.shape for tensor in tensors.values()}
    if numbers is None or numbers.ndim != 1 or len(shapes) != 1 or next(iter(shapes))[:1] != numbers.shape:
        raise UserError(f"{file} must contain {kind} and samples, equally many and all of one shape. {CREATE}")
    if not len(numbers) or numbers.is_floating_point() or numbers.is_complex() or not all_finite(tensors.values()):
        raise UserError(f"{file} needs at least one sample, {kind} that are integers, and finite, real samples.")
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise UserError(f"{file} has samples of integers: they must be floats, of images in [-1, 1]; uint8 are images.")
    numbers, samples = numbers.long(), {name: tensor.float() for name, tensor in tensors.items()}
    if limit and not ((numbers >= 0) & (numbers < limit)).all():
        allowed = "the classes of the model" if vocabulary is None else "its captions"
        raise UserError(f"{file} has {kind} outside 0..{limit - 1}, {allowed}.")
    if vocabulary is None:
        return Stored(samples, LabelRows(numbers, classes))
    return Stored(samples, WordPrompts(vocabulary.encode(captions).words[numbers]))


def stored_captions(file: Path) -> list[str]:
    """The captions of the samples of a file. Raises ``UserError`` if it is missing, damaged or has none."""
    metadata = read_metadata(file)
    if "captions" not in metadata:
        raise UserError(f"{file} has no captions, which this model needs: create it with fewstep data and --captions.")
    with reading(file, "list of captions", CREATE):
        captions = json.loads(metadata["captions"])
        if not captions or not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            raise ValueError("its metadata should list texts")
    return captions


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all numbers are real, and finite in float32."""
    return all(not tensor.is_complex() and bool(tensor.float().isfinite().all()) for tensor in tensors)
