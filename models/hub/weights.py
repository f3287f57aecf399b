"""The weight files of a diffusers network: which are loaded, their hash, and none of them a pickle."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from fewstep.core.errors import UserError
from fewstep.core.files import reading, sha256, tensor_types
from fewstep.core.json_files import read_json

WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def refuse_pickles(folder: Path) -> None:
    """Raises ``UserError`` if a component's folder has weights in pickle files only."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    pickles = [file for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise UserError(
            f"The weights in {folder} are a pickle ({pickles[0].name}), which can run code when it is loaded, so it is "
            "never opened. If you trust it, convert the pipeline to safetensors with diffusers: "
            "DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )


def variant_of(folder: Path) -> str | None:
    """``fp16`` if a component's folder has weights of this variant only (``NAME.fp16.safetensors`` or shards)."""
    files = set(folder.glob("*.safetensors"))
    return "fp16" if files and files == {*folder.glob("*.fp16[.-]*safetensors")} else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that diffusers loads from a network's folder: the shards that its index names, or one file.

    Raises ``UserError`` if they are missing or the index is damaged.
    """
    refuse_pickles(folder)
    variant = ".fp16" if variant_of(folder) else ""
    index = folder / f"{WEIGHTS}.index{variant}.json"
    files = [folder / f"diffusion_pytorch_model{variant}.safetensors"]
    if index.is_file():
        with reading(index, "index of weights"):
            files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"{missing[0]} is missing, so {folder} has no weights that can be loaded.")
    return files


def stored_dtype(folder: Path) -> torch.dtype:
    """bfloat16 if most of a network's stored weights have this type, otherwise float32: float16 and 8 bits save space
    on disk, but their range is too small for computing in general.

    Raises ``UserError`` as ``weight_files`` does, and if a file is damaged.
    """
    counts: dict[str, int] = {}
    for file in weight_files(folder):
        for name, count in tensor_types(file):
            counts[name] = counts.get(name, 0) + count
    return torch.bfloat16 if max(counts, key=counts.__getitem__, default="") == "BF16" else torch.float32


def weights_sha256(files: list[Path]) -> str:
    """SHA-256 of the contents of the files, in order; computed once per process while they do not change."""
    return _hash(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=16)
def _hash(files: tuple[tuple[Path, int, int], ...]) -> str:
    return sha256(*(file for file, _, _ in files))
