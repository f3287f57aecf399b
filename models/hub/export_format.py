"""The export formats, in a module that does not import torch, so that the command line can list them quickly."""

from __future__ import annotations

from enum import StrEnum


class ExportFormat(StrEnum):
    """The format of an export (see ``export.export``)."""

    diffusers = "diffusers"
    merged = "merged"
    lora = "lora"
    comfyui = "comfyui"
