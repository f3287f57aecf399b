"""Makes torchvision importable where its CUDA wheel was installed beside a CPU build of torch.

There ``import torchvision``, and with it open_clip, clean-fid, peft and diffusers' pipelines, ends in "operator
torchvision::nms does not exist": the C extension wants CUDA libraries, so the operators that torchvision's Python files
register kernels for were never declared. Declaring them is enough: transforms, models and datasets then work, and only
the operators themselves (``ops.nms``) and torchvision's own image reader raise when called.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from fewstep.core.errors import UserError

# As torchvision's C++ files declare them; up to 0.27 the first is enough.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

_libraries: list[torch.library.Library] = []  # a library that is collected takes its schemas with it


def import_torchvision() -> ModuleType:
    """torchvision, made importable first. Raises ``UserError`` if it is not installed."""
    if not prepare_torchvision():
        raise UserError('This needs torchvision, which is not installed. Run: pip install "fewstep[eval]"')
    return importlib.import_module("torchvision")


def prepare_torchvision() -> bool:
    """Call it before importing anything that may import torchvision. Returns whether torchvision is installed.

    Changes nothing, and imports nothing, where torch has CUDA or HIP or where torchvision's C extension loads.
    """
    if "torchvision" in sys.modules:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    gpu_build = torch.version.cuda is not None or torch.version.hip is not None
    if not gpu_build and not _extension_loads(Path(spec.origin).parent):
        _declare_operators()
    return True


def _extension_loads(package: Path) -> bool:
    """Whether one of torchvision's ``_C`` files loads, which declares its operators."""
    for file in [*package.glob("_C*.so"), *package.glob("_C*.pyd")]:
        try:
            torch.ops.load_library(file)
        except OSError:
            continue
        return True
    return False


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)
    _libraries.append(library)
