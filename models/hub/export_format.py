"""The formats of an export; apart from ``export`` so that the command line can list them without loading torch."""

from __future__ import annotations

from enum import StrEnum


class ExportFormat(StrEnum):
    """What to write."""

    diffusers = "diffusers"
    merged = "merged"
    lora = "lora"
    comfyui = "comfyui"
