"""Damage to what a long command reads, before it starts or while it trains."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from long_commands import EVERY, STEPS, LongCommand
from safetensors.torch import load_file, save_file

from fewstep.distill.loop import Loop
from fewstep.distill.trainer import Trainer

Change = Callable[[bytes], bytes | None]
CHECKPOINT = f"run/checkpoints/step-{2 * EVERY:07d}"  # the newest one in ``stopped``
FLIPS = 6  # bits of each file of a checkpoint, one at a time


def flip(seed: int) -> Change:
    """One bit, anywhere."""

    def change(content: bytes) -> bytes:
        found, bit = bytearray(content), random.Random(seed).randrange(8 * len(content))
        found[bit // 8] ^= 1 << bit % 8
        return bytes(found)

    return change


CHANGES: dict[str, Change] = {
    "cut in half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "overwritten": lambda content: random.Random(0).randbytes(len(content)),
    "missing": lambda content: None,
}
UNREADABLE = tuple(CHANGES)
READ_BY: dict[str, dict[str, tuple[str, ...]]] = {  # files in the inputs, and the changes that make them useless
    "train": {"teacher/model.safetensors": UNREADABLE, "teacher/config.json": UNREADABLE, "train.yaml": UNREADABLE,
              "squares/train.safetensors": UNREADABLE, "squares/classifier.json": UNREADABLE},
    "train, on images": {"idx/train-images-idx3-ubyte": UNREADABLE, "idx/train-labels-idx1-ubyte": UNREADABLE},
    "train, adapters": {"sd/prompts/shard-00000.safetensors": UNREADABLE, "sd/prompts/index.json": UNREADABLE,
                        "sd/prompts/null.safetensors": UNREADABLE, "sd/model_index.json": UNREADABLE,
                        "sd/unet/diffusion_pytorch_model.safetensors": UNREADABLE},
    "bench objectives": {"bench.yaml": UNREADABLE, "teacher/model.safetensors": UNREADABLE},
    "data encode, prompts": {"prompts.txt": ("empty", "overwritten", "missing"),
                             "sd/text_encoder/model.safetensors": UNREADABLE},
    "data encode, images": {"captioned/1.png": UNREADABLE[:3], "captioned/1.txt": ("empty", "missing"),
                            "sd/vae/diffusion_pytorch_model.safetensors": UNREADABLE},
    "data encode, pairs": {"captioned/pairs.csv": ("empty", "overwritten", "missing"), "captioned/2.png": UNREADABLE},
    "data preferences": {"squares/classifier.safetensors": UNREADABLE, "teacher/config.json": UNREADABLE},
    "data preferences, prompts": {"prompts.txt": ("empty", "missing")},
    "data ode-pairs": {"teacher/model.safetensors": UNREADABLE},
    "data reference": {"idx/t10k-images-idx3-ubyte": UNREADABLE, "idx/train-labels-idx1-ubyte": UNREADABLE},
    "eval": {"squares/test.safetensors": UNREADABLE, "squares/classifier.json": UNREADABLE},
    "eval, images": {"images/020.png": UNREADABLE, "brightest.yaml": UNREADABLE},
    "winrate": {"teacher/model.safetensors": UNREADABLE, "squares/classifier.safetensors": UNREADABLE},
    "sample": {"prompts.txt": ("empty", "missing"), "sd/vae/config.json": UNREADABLE},
    "export, diffusers": {"adapters/student/model.safetensors": UNREADABLE, "adapters/student/config.json": UNREADABLE},
    "export, lora": {"adapters/student/model.safetensors": UNREADABLE},
    "solver compare": {"teacher/model.safetensors": UNREADABLE},
    "solver fit-v3": {"teacher/config.json": UNREADABLE},
    "solver fit-dc": {"teacher/config.json": UNREADABLE},
}  # fmt: skip
STARTED_WITH: dict[str, dict[str, tuple[str, ...]]] = {  # the same for files in the folder that a command continues
    "train, resumed": {f"{CHECKPOINT}/state.safetensors": UNREADABLE, f"{CHECKPOINT}/state.json": UNREADABLE,
                       "run/metrics.jsonl": UNREADABLE, "run/config.yaml": UNREADABLE,
                       "run/best/model.safetensors": UNREADABLE, "run/best/config.json": UNREADABLE},
    "eval": {"run/student/model.safetensors": UNREADABLE, "run/student/config.json": UNREADABLE},
    "report": {"run/config.yaml": ("missing",), "run/metrics.jsonl": UNREADABLE},
    "replay": {f"{CHECKPOINT}/state.safetensors": UNREADABLE, f"{CHECKPOINT}/state.json": UNREADABLE,
               "run/metrics.jsonl": UNREADABLE},
}  # fmt: skip
NOT_FINITE = {  # files in the inputs of which one number becomes not finite
    "train": ("teacher/model.safetensors", "squares/train.safetensors"),
    "train, adapters": ("sd/prompts/shard-00000.safetensors", "sd/unet/diffusion_pytorch_model.safetensors"),
    "bench objectives": ("teacher/model.safetensors",),
    "data preferences": ("teacher/model.safetensors", "squares/classifier.safetensors"),
    "data ode-pairs": ("teacher/model.safetensors",),
    "eval": ("squares/test.safetensors",),
    "winrate": ("teacher/model.safetensors",),
    "export, lora": ("adapters/student/model.safetensors",),
    "solver compare": ("teacher/model.safetensors",),
    "solver fit-v3": ("teacher/model.safetensors",),
    "solver fit-dc": ("teacher/model.safetensors",),
}  # fmt: skip
MAY_DIFFER = {  # results that depend on the damaged file: what it held is lost
    "metrics.jsonl": {"run/metrics.jsonl", "run/report.html", "replay.json"},
    "run/best": {f"run/{name}/model.safetensors" for name in ("best", "student")}
    | {f"run/checkpoints/step-{2 * STEPS:07d}/state.json"},
}
LOST = {  # may differ where updates are lost, and listed, until a stage ends
    "run/lost_updates.jsonl", "run/metrics.jsonl",
    *(f"run/{kind}/step-{step:07d}.png" for kind in ("samples", "previews") for step in range(STEPS + 1)),
}  # fmt: skip


@dataclass
class DamagedCase:
    """Damaged ``files``, with what they contain instead (None: missing), or ``before``, which a command's process runs
    first. ``may_differ`` are the results that such damage may change."""

    what: str
    files: dict[Path, bytes | None] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    may_differ: set[str] = field(default_factory=set)
    _kept: dict[Path, bytes] = field(default_factory=dict)

    def damage(self) -> None:
        self._kept = {file: file.read_bytes() for file in self.files}
        for file, content in self.files.items():
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)

    def repair(self) -> None:
        for file, content in self._kept.items():
            file.write_bytes(content)


def damaged_cases(command: LongCommand, inputs: Path, out: Path) -> Iterator[DamagedCase]:
    """The cases of a command whose folder ``out`` is as it finds it."""
    for root, table in ((inputs, READ_BY), (out, STARTED_WITH)):
        for name, changes in table.get(command.name, {}).items():
            for change in changes:
                content = CHANGES[change]((root / name).read_bytes())
                own = next((own for suffix, own in MAY_DIFFER.items() if suffix in name), set[str]())
                yield DamagedCase(f"{name} {change}", {root / name: content}, may_differ=own)
    for name in NOT_FINITE.get(command.name, ()):
        yield DamagedCase(f"{name} with a number that is not finite", {inputs / name: _not_finite(inputs / name)})
    if command.name == "train, resumed":
        for name in ("state.safetensors", "state.json"):
            file = out / CHECKPOINT / name
            for seed in range(FLIPS):
                yield DamagedCase(f"{name} with a bit changed ({seed})", {file: flip(seed)(file.read_bytes())})
        files = sorted(out.glob("run/checkpoints/*/state.json"))
        yield DamagedCase("all checkpoints cut", {file: file.read_bytes()[:50] for file in files})
    if command.name in ("train", "train, on images"):
        yield from _while_training(out, 2 * STEPS if command.name == "train" else STEPS)


def _not_finite(file: Path) -> bytes:
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name].view(-1)[0] = math.nan
    temporary = file.with_name("changed")
    save_file(tensors, temporary)
    content = temporary.read_bytes()
    temporary.unlink()
    return content


def _while_training(out: Path, steps: int) -> Iterator[DamagedCase]:
    roles = ("student", "fake") if steps > STEPS else ("student",)
    for step in range(1, steps + 1):
        remove = partial(_after, step, lambda trainer: shutil.rmtree(out / "run"))
        yield DamagedCase(f"the folder removed after step {step}", before=remove)
        for role in roles:
            break_weight = partial(_after, step, partial(_damage_weight, role))
            what = f"a weight of the {role} not finite after step {step}"
            yield DamagedCase(what, before=break_weight, may_differ=LOST if step < EVERY else set())
    for step in range(1, steps - STEPS + 2):  # a stage stops only if all of its few updates are lost
        yield DamagedCase(f"gradients not finite from step {step} on", before=partial(_damage_gradients, step))


def _after(step: int, action: Callable[[Trainer], object]) -> None:
    train = Trainer.one_step

    def one_step(self: Trainer) -> dict[str, torch.Tensor]:
        metrics = train(self)
        if self.step == step:
            action(self)
        return metrics

    Trainer.one_step = one_step  # type: ignore[method-assign]


def _damage_weight(role: str, trainer: Trainer) -> None:
    trainer.roles[role].parameters[0].data.view(-1)[0] = math.nan


def _damage_gradients(first: int) -> None:
    gradients = Loop._gradients

    def damaged(self: Loop, update, step, shared):  # type: ignore[no-untyped-def]
        found = gradients(self, update, step, shared)
        if step + 1 >= first:
            for role in update.roles:
                for parameter in self.roles[role].parameters:
                    parameter.grad.fill_(math.nan)
        return found

    Loop._gradients = damaged  # type: ignore[method-assign]
