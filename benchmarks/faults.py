"""Kills and fails every long command on purpose, checks what is left and continues it: ``python benchmarks/faults.py``.

Writes the counts to results/faults/: ``kills.json``, ``disk.json``, ``data.json``, ``long_run.json`` and, where the
package ckpt-chaos is installed, ``ckpt_chaos.json``. ``--only kills`` does one of them. What went wrong is printed, and
then the exit code is 1.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from ckpt_chaos_check import check_with_ckpt_chaos  # noqa: E402
from damaged_inputs import damaged_cases  # noqa: E402
from injected_faults import Ended, Fault, preload, run_command  # noqa: E402
from long_commands import COMMANDS, LongCommand, contents, damage, register_metric, write_inputs  # noqa: E402
from long_run import measure_long_run  # noqa: E402

PLACED = {
    "train": 60,
    "train, resumed": 40,
    "bench objectives": 20,
    "data encode, prompts": 50,
}  # kills at events; of other commands:
OTHERS = 14
RANDOM = 4  # kills at random moments, each followed by another one
QUICK = {"train": 5, "train, resumed": 2, "data reference": 3, "eval, images": 2}  # commands and kills of --quick


@dataclass
class Counts:
    """Of one command: faults that took effect; those that ended it with a message in words; those that did not end it
    or change its result; those after which the next call had the undisturbed result."""

    faults: int = 0
    message: int = 0
    unharmed: int = 0
    continued: int = 0


class Workplace:
    """The inputs of the commands, what an undisturbed run of each leaves, and the problems found. ``quick`` is for a
    few commands and faults of each."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.inputs, self.out, self.quick = folder / "inputs", folder / "out", quick
        self.commands = [command for command in COMMANDS if not quick or command.name in QUICK]
        self.problems: list[str] = []
        write_inputs(self.inputs, self.out, pipelines=not quick)
        self.undisturbed: dict[str, tuple[Ended, dict[str, str]]] = {}
        for command in self.commands:
            ended = self.start(command)
            assert ended.code == 0, f"{command.name}: {ended.text}"
            self.undisturbed[command.name] = ended, contents(self.out)

    def start(self, command: LongCommand, **fault: Any) -> Ended:
        command.begin(self.inputs, self.out)
        return self.run(command.arguments(self.inputs, self.out), **fault)

    def run(self, arguments: list[object], **fault: Any) -> Ended:
        return run_command(arguments, self.out, **fault)

    def check_whole(self, command: LongCommand, what: str, ended: Ended) -> None:
        """After a fault: everything complete is there and readable."""
        self.problems += [f"{command.name}, {what}: {text}" for text in damage(self.out, ended.events)]

    def continues(self, command: LongCommand, what: str, may_differ: Collection[str] = ()) -> bool:
        """Whether the next call completes the command with the undisturbed result and no other file. What is complete
        already needs none, and may refuse it, since it exists."""
        if not self.differing(command):
            return True
        ended = self.run(command.next(self.inputs, self.out))
        if ended.code != 0:
            self.problems.append(f"{command.name}, {what}: the next call ended with {ended.code}: {ended.text[-600:]}")
            return False
        return self.is_undisturbed(command, what, may_differ)

    def is_undisturbed(self, command: LongCommand, what: str, may_differ: Collection[str] = ()) -> bool:
        if other := [name for name in self.differing(command) if name not in may_differ]:
            self.problems.append(f"{command.name}, {what}: other than undisturbed: {', '.join(other)}")
        return not other

    def differing(self, command: LongCommand) -> list[str]:
        """The files that are missing, or other than those of an undisturbed run."""
        found, expected = contents(self.out), self.undisturbed[command.name][1]
        return sorted(name for name in found | expected if found.get(name) != expected.get(name))

    def check_refused(
        self, command: LongCommand, what: str, ended: Ended, counts: Counts, may_differ: Collection[str] = ()
    ) -> None:
        """A fault that was no kill: a message in words, or no effect but leftovers that the next call removes."""
        counts.faults += 1
        tolerated = [*may_differ, *(name for name in self.differing(command) if ".part" in name)]
        if ended.code == 0 and self.is_undisturbed(command, what, tolerated):
            counts.unharmed += 1
        elif ended.in_words:
            counts.message += 1
        elif ended.code != 0:
            self.problems.append(f"{command.name}, {what}: ended with {ended.code}: {ended.text[-600:]}")


def evenly(numbers: list[int], most: int) -> list[int]:
    """At most ``most`` of them, evenly spread."""
    return numbers if len(numbers) <= most else [numbers[k * len(numbers) // most] for k in range(most)]


def kill(place: Workplace, command: LongCommand) -> Counts:
    """Kills a command before events, in the middle of safetensors files, and twice at random moments."""
    undisturbed, counts = place.undisturbed[command.name][0], Counts()
    events, numbers = undisturbed.events, random.Random(command.name)
    saves = [k for k, event in enumerate(events, 1) if event.operation == "save"]
    most = QUICK[command.name] if place.quick else PLACED.get(command.name, OTHERS)
    faults = [Fault(at) for at in evenly(list(range(1, len(events) + 1)), most)]
    faults += [Fault(at, "tear") for at in evenly(saves, 1 if place.quick else max(3, most // 5))]
    for fault in faults:
        what = f"{fault.kind} at event {fault.at} ({' '.join(events[fault.at - 1])})"
        ended = place.start(command, fault=fault)
        if ended.code != -9:
            place.problems.append(f"{command.name}, {what}: ended with {ended.code}")
            continue
        counts.faults += 1
        place.check_whole(command, what, ended)
        counts.continued += place.continues(command, what)
    for _ in range(1 if place.quick else RANDOM):
        moments = [numbers.uniform(0, undisturbed.seconds) for _ in range(2)]
        what = f"killed after {moments[0]:.3f} s and {moments[1]:.3f} s"
        killed = 0
        for k, moment in enumerate(moments):
            again = command.next(place.inputs, place.out)
            ended = place.run(again, kill_after=moment) if k else place.start(command, kill_after=moment)
            killed += ended.code == -9
            place.check_whole(command, what, ended)
        counts.faults += killed
        counts.continued += killed * place.continues(command, what)
    return counts


def fail_disk(place: Workplace, command: LongCommand) -> Counts:
    """Lets operations fail as on a full, damaged, read-only or forbidden disk, and limits the size of files."""
    events, counts = place.undisturbed[command.name][0].events, Counts()
    some, writes = list(range(1, len(events) + 1)), ("open", "save", "mkdir", "fsync")
    spaces = [k for k in some if events[k - 1].operation in writes]
    changes = [k for k in some if events[k - 1].operation in (*writes, "rename", "remove")]
    faults = [Fault(at, "fail", errno.ENOSPC, lasting=True) for at in evenly(spaces, 4)]
    faults += [Fault(at, "fail", errno.EIO) for at in evenly(changes[1:], 4)]
    faults += [Fault(at, "fail", errno.EACCES) for at in evenly(changes[2:], 4)]
    faults += [Fault(1, "fail", errno.EROFS, lasting=True)]
    for fault in faults[:: 13 if place.quick else 1]:
        what = f"{errno.errorcode[fault.number]} at event {fault.at} ({' '.join(events[fault.at - 1])})"
        ended = place.start(command, fault=fault)
        place.check_whole(command, what, ended)
        place.check_refused(command, what, ended, counts)
        counts.continued += place.continues(command, what)
    ended = place.start(command, limit=200)
    place.check_whole(command, "files of 200 bytes", ended)
    place.check_refused(command, "files of 200 bytes", ended, counts)
    counts.continued += place.continues(command, "files of 200 bytes")
    return counts


def damage_data(place: Workplace, command: LongCommand) -> Counts:
    """Damages what a command reads, removes its folder, and puts in numbers that are not finite."""
    counts = Counts()
    command.begin(place.inputs, place.out)
    for case in list(damaged_cases(command, place.inputs, place.out))[:: 25 if place.quick else 1]:
        command.begin(place.inputs, place.out)
        case.damage()
        ended = place.run(command.arguments(place.inputs, place.out), before=case.before)
        place.check_refused(command, case.what, ended, counts, case.may_differ)
        if ended.code != 0 or not any(file.is_relative_to(place.out) for file in case.files):
            case.repair()
        counts.continued += place.continues(command, case.what, case.may_differ)
    return counts


def count(place: Workplace, do: Callable[[Workplace, LongCommand], Counts], file: Path, chosen: str) -> list[str]:
    """Does it to every command whose name contains ``chosen``, and writes the counts to ``file``, where those of other
    commands stay. Returns the problems."""
    known = json.loads(file.read_text())["commands"] if chosen and file.is_file() else {}
    problems: list[str] = []
    for command in place.commands:
        if chosen not in command.name:
            continue
        started, place.problems = time.monotonic(), []
        counts = do(place, command)
        if not counts.faults:
            continue
        own = vars(counts) | {"problems": len(place.problems), "seconds": round(time.monotonic() - started, 1)}
        known[command.name] = own
        print(f"{file.stem}, {command.name}: {own}", *place.problems, sep="\n    ", flush=True)
        problems += place.problems
        total = {name: sum(each[name] for each in known.values()) for name in own}
        result = total | {"seconds": round(total["seconds"]), "commands": known}
        file.write_text(json.dumps(result, indent=1) + "\n")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("kills", "disk", "data", "long_run", "ckpt_chaos")
    parser.add_argument("--only", choices=kinds, nargs="+", default=kinds)
    parser.add_argument("--command", default="", help="only those whose name contains this; the counts of others stay")
    parser.add_argument("--quick", action="store_true", help="a few commands and faults, as in the tests")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "faults")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = tempfile.tempdir = folder  # killed commands leave their temporary folders there
        register_metric()
        preload(pipelines=not arguments.quick)
        place = Workplace(Path(folder), arguments.quick)
        for name, do in (("kills", kill), ("disk", fail_disk), ("data", damage_data)):
            if name in arguments.only:
                problems += count(place, do, arguments.folder / f"{name}.json", arguments.command)
        for name, measure in (("long_run", measure_long_run), ("ckpt_chaos", check_with_ckpt_chaos)):
            if name in arguments.only and not arguments.command:
                result = measure(place.inputs, Path(folder))
                print(f"{name}: {result}", flush=True)
                (arguments.folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(f"{len(problems)} problems" if problems else 0)


if __name__ == "__main__":
    main()
