"""``fewstep doctor``: what this machine and this installation can do, as found by trying."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.eval.networks import dinov2, i3d, inception
from fewstep.eval.networks.clip import FILES, find_cached
from fewstep.eval.networks.weights import VARIABLE, WeightsLocator, hub_cache, temporary_folder
from fewstep.eval.protocol import Protocol
from fewstep.models.attention import Backend, runs
from fewstep.models.loading import bundled_models

GIB = 2**30
USES = {  # what an extra is for; those that are not here are for developers
    "diffusers": "diffusers pipelines as teachers (fewstep demo --text, fewstep data encode, fewstep export)",
    "lora": "adapters (adapters: in a config, fewstep export --to lora)",
    "eval": "metrics of protocols, each with its weights (fewstep eval --protocol)",
    "efficientnet": "the metric fd_efficientnet",
    "quantized": "8- and 4-bit weights, 8-bit AdamW",
    "data": "images from Parquet files, WebDatasets and the hub (data.kind: dataset)",
    "video": "reading and writing MP4",
    "tensorboard": "the tracker TensorBoard",
    "app": "trying a model in the browser (fewstep app)",
    "xformers": "the attention kernel xformers",
}
CLIP = {  # where open_clip gets these weights
    "ViT-g-14:laion2b_s12b_b42k": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "ViT-B-32:openai": "timm/vit_base_patch32_clip_224.openai",
    "ViT-L-14-336:openai": "timm/vit_large_patch14_clip_336.openai",
}
WEIGHTS: Mapping[str, Callable[[WeightsLocator], Path]] = {
    "Inception-V3": lambda at: at.find(inception.SCRIPT, inception.SCRIPT_URL, [temporary_folder()]),
    "Inception-V3 (pytorch-fid)": lambda at: at.find(inception.PORT, inception.PORT_URL, [hub_cache()]),
    "CLIP of CLIP scores": lambda at: _clip(Protocol.model_fields["clip"].default, at),
    "CLIP of CLIP-FID": lambda at: _clip("ViT-B-32:openai", at),
    "CLIP of CMMD": lambda at: _clip("ViT-L-14-336:openai", at),
    "DINOv2": lambda at: at.find(dinov2.FILE, dinov2.URL),
    "I3D": lambda at: at.find(i3d.FILE, i3d.URL),
}


def doctor() -> dict[str, Any]:
    """What was found, as JSON: ``versions``, ``devices`` (each with its memory and the attention backends that work),
    ``cpu``, ``extras``, ``weights`` of metrics, ``folders``, ``bundled`` models, and what is ``usable`` or ``missing``
    because of it. Memory is in GiB. Downloads nothing."""
    extras = {name: extra(requirements) for name, requirements in requirements_of_extras().items() if name in USES}
    devices = [device(name) for name in ("cpu", "cuda", "mps") if available(name)]
    weights = metric_weights()
    usable, missing = conclusions(devices, extras, weights)
    return {
        "versions": versions(["fewstep", "torch"], extras),
        "devices": devices,
        "cpu": cpu(),
        "extras": extras,
        "weights": weights,
        "folders": folders(),
        "bundled": bundled_models(),
        "usable": usable,
        "missing": missing,
    }


def versions(packages: Sequence[str], extras: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Python's, and those of packages and of what the extras installed."""
    installed = {name: version for extra in extras.values() for name, version in extra["packages"].items() if version}
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages} | installed


def cpu() -> dict[str, Any]:
    """Processors, those that this process may use, torch's threads, and memory."""
    memory = psutil.virtual_memory()
    affinity = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    return {
        "processors": os.cpu_count(), "for_this_process": affinity, "threads": torch.get_num_threads(),
        "memory": round(memory.total / GIB, 1), "free": round(memory.available / GIB, 1),
    }  # fmt: skip


def available(name: str) -> bool:
    """Whether torch finds devices of this kind."""
    try:
        pick_device(name)
    except UserError:
        return False
    return True


def device(kind: str) -> dict[str, Any]:
    """A device: its name and memory, whether it computes, and with which attention backends."""
    place = torch.device(kind)
    found: dict[str, Any] = {"device": kind, "name": platform.machine()}
    try:
        if kind == "cuda":
            free, total = torch.cuda.mem_get_info()
            name, count = torch.cuda.get_device_name(), torch.cuda.device_count()
            found |= {"name": name, "count": count, "memory": round(total / GIB, 1), "free": round(free / GIB, 1)}
        works = torch.ones(2, device=place).sum().item() == 2
        precision = torch.bfloat16 if place.type == "cuda" else torch.float32  # flash on a GPU has no float32
        kernels = [name for name in get_args(Backend) if runs(name, place, precision)]
        return found | {"works": works, "attention": kernels}
    except RuntimeError as error:  # a driver that does not fit, a device that is busy
        return found | {"works": False, "attention": [], "error": str(error).partition("\n")[0]}


def requirements_of_extras() -> dict[str, list[Requirement]]:
    """What each extra of this installation installs here."""
    found: dict[str, list[Requirement]] = {}
    parsed = [Requirement(line) for line in metadata.requires("fewstep") or []]
    for name in metadata.metadata("fewstep").get_all("Provides-Extra") or []:
        found[name] = [
            each
            for each in parsed
            if each.marker and each.marker.evaluate({"extra": name}) and not each.marker.evaluate({"extra": ""})
        ]
    return found


def extra(requirements: Sequence[Requirement]) -> dict[str, Any]:
    """The packages of an extra with their versions, None for one that is missing or too old, and whether all fit."""
    packages: dict[str, str | None] = {}
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        packages[requirement.name] = version if fits else None
    return {"installed": bool(packages) and all(packages.values()), "packages": packages}


def metric_weights() -> dict[str, dict[str, str | None]]:
    """By network: the file of its weights, or what to do to get it."""
    locator, found = WeightsLocator.from_environment(), {}
    for name, find in WEIGHTS.items():
        try:
            found[name] = {"file": str(find(locator)), "missing": None}
        except UserError as error:
            found[name] = {"file": None, "missing": str(error)}
    return found


def _clip(name: str, locator: WeightsLocator) -> Path:
    """Without importing open_clip, which takes seconds."""
    repository = CLIP[name]
    found, file = find_cached(repository), f"{name.replace(':', '-')}.safetensors"
    return found or locator.find(file, f"{FILES[0]} of https://huggingface.co/{repository}")


def folders() -> dict[str, dict[str, Any]]:
    """The working folder with the free space on its disk, and the folders in which libraries look for weights."""
    here = Path.cwd()
    caches = {"hub cache": Path(HF_HUB_CACHE), "torch cache": hub_cache(), "clean-fid": temporary_folder()}
    own = [Path(part) for part in os.environ.get(VARIABLE, "").split(os.pathsep) if part]
    caches |= {f"{VARIABLE} {k + 1}": path for k, path in enumerate(own)}
    free = round(shutil.disk_usage(here).free / GIB, 1)
    return {"working folder": {"path": str(here), "exists": True, "free": free}} | {
        name: {"path": str(path), "exists": path.is_dir()} for name, path in caches.items()
    }


def conclusions(
    devices: Sequence[Mapping[str, Any]], extras: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """What is usable, and what is missing with the command that installs it."""
    usable = [f"training and sampling on {each['device']}" for each in devices if each["works"]]
    usable += [f"the bundled models {', '.join(bundled_models())} (fewstep demo)"]
    usable += [USES[name] for name, found in extras.items() if found["installed"]]
    missing = [f"{each['device']} does not compute: {each.get('error')}" for each in devices if not each["works"]]
    missing += [
        f"{USES[name]}: pip install 'fewstep[{name}]'" for name, found in extras.items() if not found["installed"]
    ]
    absent = [name for name, found in weights.items() if found["file"] is None]
    if absent:
        where = "fewstep eval --protocol … --download fetches them, fewstep doctor --json - lists their addresses"
        missing.append(f"metrics with the weights of {', '.join(absent)}: {where}")
    return usable, missing
