"""Every command that writes something after some work, on tiny inputs, with what it must leave behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from injected_faults import Ended, Fault, run_command
from PIL import Image
from random_sets import write_images
from tiny_pipelines import ADAPTERS, TINY, settings, write_embeddings
from torch import Tensor
from worlds import tiny_config, tiny_teacher, write_idx

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.core.json_files import read_json
from fewstep.distill.checkpoint import checkpoints, read_checkpoint
from fewstep.eval import saved_features
from fewstep.eval.metrics.metric import Metric

CLOCK = {"seconds", "training_seconds", "started", "record_sha256"}  # what two equal runs may differ in
UNTRACKED = {".lock", "environment.json", "resumes.jsonl"}  # of a run folder: the lock, the machine, the resumptions
UNFINISHED = (".part", ".old", ".partial.safetensors")
STEPS, EVERY = 4, 3  # of each of two stages; of checkpoints


class Means:
    """Features of a metric of one's own: the mean of each channel."""

    name, sha256, dimension = "means", "ab", 3

    def prepare(self, image: Tensor) -> Tensor:
        return image.float().mean((1, 2))

    def __call__(self, images: Tensor) -> Tensor:
        return images.clone()


def register_metric() -> None:
    """The metric ``brightest``, whose features are saved after every 16 images."""
    saved_features.PART_IMAGES = 16
    fewstep.register("network", "means")(lambda protocol, locator, device: Means())
    fewstep.register("metric", "brightest")(
        Metric("brightest", "means", "higher", 2, lambda inputs: float(inputs.images.statistics.mean.max()))
    )


@dataclass(frozen=True)
class LongCommand:
    """``arguments(inputs, out)`` of a command that writes below ``out``; ``again(inputs, out)`` are those with which a
    user continues it. ``start``: the name of a folder in ``inputs`` with which ``out`` begins."""

    name: str
    arguments: Callable[[Path, Path], list[object]]
    again: Callable[[Path, Path], list[object]] | None = None
    start: str | None = None

    def begin(self, inputs: Path, out: Path) -> None:
        """Makes ``out`` the folder that the command finds."""
        shutil.rmtree(out, ignore_errors=True)
        if self.start is None:
            out.mkdir()
        else:
            shutil.copytree(inputs / self.start, out)

    def next(self, inputs: Path, out: Path) -> list[object]:
        """The arguments of the next call after one that ended early."""
        return (self.again or self.arguments)(inputs, out)


def _train(config: str) -> Callable[[Path, Path], list[object]]:
    return lambda inputs, out: ["train", inputs / config, f"out={out / 'run'}"]


def _resume(config: str) -> Callable[[Path, Path], list[object]]:
    """What the messages of ``train`` advise: --resume, once there is a run."""

    def arguments(inputs: Path, out: Path) -> list[object]:
        started = (out / "run" / "config.yaml").is_file()
        return ["train", "--resume", out / "run"] if started else _train(config)(inputs, out)

    return arguments


def _preferences(inputs: Path, model: str, out: Path) -> list[object]:
    return [
        "data", "preferences", inputs / model, "--out", out, "--reward", "brightness", "--n", 12, "--candidates", 2,
        "--steps", 2, "--solver", "euler", "--reference", inputs / "squares",
    ]  # fmt: skip


def _encode(inputs: Path, what: str, out: Path) -> list[object]:
    return ["data", "encode", inputs / what, "--teacher", inputs / "sd", "--out", out / "encoded", "--rows", 3]


COMMANDS = [
    LongCommand("train", _train("train.yaml"), _resume("train.yaml")),
    LongCommand("train, resumed", _resume("train.yaml"), start="stopped"),
    LongCommand("train, on images", _train("pretrain.yaml"), _resume("pretrain.yaml")),
    LongCommand("train, adapters", _train("adapters.yaml"), _resume("adapters.yaml")),
    LongCommand("bench objectives", lambda i, o: ["bench", "objectives", i / "bench.yaml", f"out={o / 'bench'}"]),
    LongCommand("data encode, prompts", lambda i, o: _encode(i, "prompts.txt", o)),
    LongCommand("data encode, images", lambda i, o: _encode(i, "captioned", o)),
    LongCommand("data encode, pairs", lambda i, o: _encode(i, "captioned/pairs.csv", o)),
    LongCommand("data preferences", lambda i, o: _preferences(i, "teacher", o / "pairs.safetensors")),
    LongCommand("data preferences, prompts", lambda i, o: [
        *_preferences(i, "sd", o / "pairs"), "--captions", i / "prompts.txt", "--size", "16x16"]),
    LongCommand("data ode-pairs", lambda i, o: [
        "data", "ode-pairs", i / "teacher", "--n", 20, "--steps", 2, "--out", o / "new" / "pairs.safetensors"]),
    LongCommand("data reference", lambda i, o: [
        "data", "reference", i / "idx", "--out", o / "squares", "--network", "classifier", "--epochs", 1]),
    LongCommand("eval", lambda i, o: ["eval", o / "run", "--reference", i / "squares", "--steps", "1,2", "--n", 20],
                start="trained"),
    LongCommand("eval, images", lambda i, o: [
        "eval", i / "images", "--protocol", i / "brightest.yaml", "--json", o / "scores.json"]),
    LongCommand("winrate", lambda i, o: [
        "winrate", i / "teacher", i / "teacher", "--n", 20, "--steps", 1, "--solver", "euler", "--rewards",
        "brightness", "--reference", i / "squares", "--json", o / "wins.json"]),
    LongCommand("sample", lambda i, o: [
        "sample", i / "sd", "--prompts", i / "prompts.txt", "--size", "16x16", "--steps", 1, "--batch", 2,
        "--out", o / "samples"]),
    LongCommand("export, diffusers", lambda i, o: ["export", i / "adapters", "--out", o / "student"]),
    LongCommand("export, lora", lambda i, o: ["export", i / "adapters", "--to", "lora", "--out", o / "student"]),
    LongCommand("solver compare", lambda i, o: [
        "solver", "compare", i / "teacher", "--solvers", "ddim,unipc_2", "--nfe", "2,3", "--n", 20, "--long", 4,
        "--out", o / "solvers"]),
    LongCommand("solver fit-v3", lambda i, o: [
        "solver", "fit-v3", i / "teacher", "--n", 2, "--intervals", 12, "--out", o / "statistics.safetensors"]),
    LongCommand("solver fit-dc", lambda i, o: [
        "solver", "fit-dc", i / "teacher", "--steps", 3, "--n", 2, "--out", o / "dc_solver.json"]),
    LongCommand("report", lambda i, o: ["report", o / "run"], start="trained"),
    LongCommand("replay", lambda i, o: ["replay", o / "run", "--step", 8, "--json", o / "replay.json"],
                start="trained"),
]  # fmt: skip
BY_NAME = {command.name: command for command in COMMANDS}


def write_inputs(inputs: Path, out: Path, *, pipelines: bool = True) -> None:
    """The inputs of all commands; ``pipelines=False`` leaves out those that need diffusers. Runs are trained below
    ``out``, where commands find them."""
    inputs.mkdir(parents=True)
    tiny_teacher(inputs / "teacher")
    (inputs / "idx").mkdir()
    numbers = torch.Generator().manual_seed(0)
    for split, n in (("train", 60), ("test", 30)):
        labels = torch.arange(n) % 10
        images = (torch.randint(0, 128, (n, 8, 8), generator=numbers) + 12 * labels[:, None, None]).to(torch.uint8)
        write_idx(inputs / "idx", images, labels.to(torch.uint8), split)
    write_images(inputs / "images", 40, 0, 8)
    _succeeds(
        ["data", "reference", inputs / "idx", "--out", inputs / "squares", "--network", "classifier", "--epochs", 1],
        inputs,
    )
    protocol = {"name": "brightest", "metrics": ["brightest"], "n": 40}
    (inputs / "brightest.yaml").write_text(yaml.safe_dump(protocol))
    (inputs / "prompts.txt").write_text("a cat\ntwo dogs\nthe sea\na red hat\nrain\n")
    rates = {"student": {"lr": 1e-3, "ema": 0.9}, "fake": {"lr": 1e-3}}
    tdm = {"objective": {"name": "tdm", "steps": 2}, "roles": rates}
    dmd2 = {"objective": {"name": "dmd2", "steps": 2, "critic_updates": 1}, "roles": rates}
    own = {"health": {"every": 0}, "validation": {"every": 2, "n": 20, "reference": str(inputs / "squares")}}
    stages = [{**tdm, "steps": STEPS}, {**dmd2, "steps": STEPS}]
    checkpoint = {"every": EVERY, "keep": 2}
    _write(inputs / "train.yaml", tiny_config(inputs, stages=stages, checkpoint=checkpoint, batch=4, **own))
    student = {"steps": STEPS, "objective": "flow_matching", "roles": {"student": {"lr": 1e-3, "init": "model"}}}
    network = {"name": "unet", "widths": [8], "blocks": [1], "embedding": 8}
    _write(inputs / "pretrain.yaml", {
        "out": "", "model": {"backbone": network, "shape": [1, 8, 8], "classes": 10}, "batch": 4, "log_every": 1,
        "data": {"kind": "idx", "path": str(inputs / "idx")}, "stages": [student], "checkpoint": checkpoint,
        "health": {"every": 0},
    })  # fmt: skip
    base = {"teacher": str(inputs / "teacher"), "batch": 4, "log_every": 1, "checkpoint": {"every": 3}, **own}
    _write(inputs / "bench.yaml", {
        "out": "", "evaluations": 90, "seeds": [0], "steps": [2], "n": 20, "reference": str(inputs / "squares"),
        "base": base, "methods": {"tdm": {"stages": [tdm]}, "dmd2": {"stages": [dmd2]}},
    })  # fmt: skip
    _keep_runs(inputs, out)
    if pipelines:
        _write_pipelines(inputs)


def _write(file: Path, raw: dict[str, Any]) -> None:
    file.write_text(yaml.safe_dump(raw))


def _succeeds(arguments: Sequence[object], root: Path, **changes: Any) -> Ended:
    ended = run_command(arguments, root, **changes)
    assert ended.code == 0, ended.text
    return ended


def _keep_runs(inputs: Path, out: Path) -> None:
    """``trained``: a finished run; ``stopped``: one that was killed after the second checkpoint."""
    out.mkdir()
    undisturbed = _succeeds(_train("train.yaml")(inputs, out), out)
    shutil.copytree(out, inputs / "trained")
    final = str(out / "run" / "checkpoints" / f"step-{2 * EVERY:07d}")
    at = next(k for k, event in enumerate(undisturbed.events, 1) if event.to == final) + 4
    shutil.rmtree(out)
    out.mkdir()
    run_command(_train("train.yaml")(inputs, out), out, fault=Fault(at))
    shutil.copytree(out, inputs / "stopped")
    shutil.rmtree(out)


def _write_pipelines(inputs: Path) -> None:
    TINY["sd"].build().save_pretrained(inputs / "sd")
    write_embeddings("sd", inputs / "sd")
    _write(inputs / "adapters.yaml", settings(inputs / "sd", "sd", inputs / "adapters", ADAPTERS))
    _succeeds(["train", inputs / "adapters.yaml"], inputs)
    (inputs / "captioned").mkdir()
    for k in range(4):
        numbers = torch.Generator().manual_seed(k)
        pixels = torch.randint(0, 256, (16, 16, 3), generator=numbers, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(inputs / "captioned" / f"{k}.png")
        (inputs / "captioned" / f"{k}.txt").write_text(f"image {'abcd'[k]}\n")
    rows = "".join(f"{k}.png,{k + 1}.png,image {k}\n" for k in range(3))
    (inputs / "captioned" / "pairs.csv").write_text(f"winner,loser,caption\n{rows}")


# --- what is left behind ----------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, str]:
    """A digest of every file and every empty folder below ``out`` by its path, without what depends on the clock."""
    found = (path for path in sorted(out.rglob("*")) if path.name not in UNTRACKED)
    return {
        str(path.relative_to(out)): _digest(path) if path.is_file() else "empty"
        for path in found
        if path.is_file() or not any(path.iterdir())
    }


def _digest(file: Path) -> str:
    content = file.read_bytes()
    with suppress(ValueError):  # half a file has its own digest
        if file.suffix == ".json":
            content = json.dumps(_without_clock(json.loads(content))).encode()
        elif file.suffix == ".jsonl":
            content = json.dumps([_without_clock(json.loads(line)) for line in content.splitlines()]).encode()
        elif file.suffix == ".safetensors":  # the order of its metadata is random
            start = 8 + int.from_bytes(content[:8], "little")
            content = json.dumps(json.loads(content[8:start]), sort_keys=True).encode() + content[start:]
    return hashlib.sha256(content).hexdigest()


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_clock(content) for name, content in value.items() if name not in CLOCK}
    return [_without_clock(content) for content in value] if isinstance(value, list) else value


def damage(out: Path, events: Sequence[tuple[str, ...]]) -> list[str]:
    """What is wrong below ``out`` after a command was ended at the last of its ``events``: files and checkpoints that
    are not whole, and what it had given its final name before and is missing."""
    found = []
    for file in sorted(out.rglob("*")):
        inside = file.relative_to(out).parts
        if file.is_file() and not any(part.startswith(".") or part.endswith(UNFINISHED) for part in inside):
            try:
                _read(file)
            except (UserError, ValueError, OSError) as error:
                found.append(f"{file.relative_to(out)}: {error}")
    for checkpoint in (path for folder in out.rglob("checkpoints") for path in checkpoints(folder)):
        try:
            read_checkpoint(checkpoint)
        except (UserError, KeyError) as error:
            found.append(f"{checkpoint.relative_to(out)}: {error}")
    missing = (Path(path) for path in _finished(events) if not Path(path).exists())
    return found + [f"{path.relative_to(out)} is missing" for path in missing]


def _finished(events: Sequence[tuple[str, ...]]) -> set[str]:
    """The files and folders that were renamed to their final names before the last event, and not moved away since."""
    finished: set[str] = set()
    for operation, path, to in events[:-1]:
        if operation == "rename":
            finished = {each for each in finished if each != path and not each.startswith(f"{path}/")}
            if not any(part.startswith(".") or part.endswith(UNFINISHED) for part in Path(to).parts[2:]):
                finished.add(to)
        elif operation in ("remove", "rmdir"):
            finished.discard(path)
    if events and events[-1][0] in ("rename", "remove", "rmdir"):  # whether the last one happened is unknown
        finished.discard(events[-1][1])
    return finished


def _read(file: Path) -> None:
    if file.suffix == ".json":
        read_json(file)
    elif file.suffix == ".jsonl":
        for line in file.read_bytes().split(b"\n")[:-1]:  # the last line may be half a one
            json.loads(line)
    elif file.suffix == ".safetensors":
        read_tensors(file)
    elif file.suffix == ".png":
        with Image.open(file) as image:
            image.load()
    elif file.suffix == ".yaml":
        yaml.safe_load(file.read_text())
