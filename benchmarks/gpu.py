"""Checks and measures everything that needs a GPU: ``python benchmarks/gpu.py --out results/gpu.json``.

Each part runs in a process of its own with a time limit, each of its cases records numbers or the traceback of its
error, and the file is rewritten after every case. Parts that measure time have the device to themselves, checks run at
once. The next parts import while one runs; the planned memory, which needs no device, is computed beside them.
``--device cpu --tiny`` tries the same code in a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HERE = (str(ROOT / "src"), str(ROOT / "benchmarks"))
WHOLE = "the part"  # the case under which an error of a whole part is recorded
Results = dict[str, dict[str, dict[str, Any]]]  # by part and case


class Part(NamedTuple):
    """``module.function(device, tiny)`` returns the cases; ``limit`` is in seconds; ``imports`` are slow libraries.
    ``alone``: it measures time or memory, so that no other part may use the device."""

    module: str
    function: str
    limit: float
    imports: tuple[str, ...] = ()
    alone: bool = True


PIPELINES = ("diffusers", "peft", "transformers")
PARTS: Mapping[str, Part] = {
    "facts": Part("gpu_speed", "facts", 30),
    "step": Part("gpu_speed", "step", 60),
    "graphs": Part("gpu_speed", "graphed", 60),
    "sdxl": Part("gpu_adapters", "sdxl", 90, PIPELINES),
    "flux": Part("gpu_adapters", "flux", 120, PIPELINES),
    "attention": Part("gpu_speed", "attention", 60),
    "waits": Part("gpu_checks", "waits", 120, PIPELINES, alone=False),
    "equality": Part("gpu_checks", "equality", 120, alone=False),
    "processes": Part("gpu_checks", "processes", 90, alone=False),
    "sampling": Part("gpu_speed", "sampling", 60),
    "compile": Part("gpu_speed", "compiled", 120),
}
PLAN = Part("gpu_adapters", "planned", 600, PIPELINES)


# --- in the process of a part -----------------------------------------------------------------------------------------


def run_part(part: Part, device: str, tiny: bool) -> None:
    """Imports, waits for a line on the standard input, and writes a line of JSON for each case."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with them
    sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
    if part.imports:
        from fewstep.core.torchvision_compat import prepare_torchvision

        prepare_torchvision()
    for name in (part.module, *part.imports):
        importlib.import_module(name)
    cases = getattr(sys.modules[part.module], part.function)(device, tiny)
    sys.stdin.readline()
    for name, work in cases.items():
        lines.write(json.dumps({"case": name, "result": outcome(work)}) + "\n")
        lines.flush()


def outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The seconds and the result of a case, or its error."""
    started = time.perf_counter()
    try:
        result = work()
        json.dumps(result, allow_nan=False)  # a number that is not finite is an error
    except Exception:
        result = {"error": traceback.format_exc()}
    return {"seconds": time.perf_counter() - started, **result}


# --- in the first process ---------------------------------------------------------------------------------------------


class Worker:
    """The process of a part: importing until ``start``, killed with its children after ``seconds``."""

    def __init__(self, part: Part, device: str, tiny: bool) -> None:
        code = f"import gpu; gpu.run_part(gpu.{part!r}, {device!r}, {tiny!r})"
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*HERE, *_python_path()])}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115, open as long as the process
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def start(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended already: ``cases`` reports why
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def cases(self, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
        """The cases as they end; at last the error of the process, if it failed or ran out of time."""
        until, started = time.monotonic() + seconds, time.monotonic()
        try:
            while (line := self.lines.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                found = json.loads(line)
                yield found["case"], found["result"]
            code = self.process.wait(10)
            if code:
                yield WHOLE, {"seconds": time.monotonic() - started, "error": f"exit code {code}: {self._messages()}"}
        except (queue.Empty, subprocess.TimeoutExpired):
            error = f"stopped after {seconds:.0f} seconds; the cases that are missing did not end: {self._messages()}"
            yield WHOLE, {"seconds": time.monotonic() - started, "error": error}
        finally:
            self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _messages(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-4000:]


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def run_all(names: list[str], out: Path, device: str, tiny: bool, limit: float) -> Results:
    """Runs parts within ``limit`` seconds in all and writes what they found."""
    out.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + limit
    results: Results = {}
    lock = threading.Lock()

    def record(part: str, case: str, result: dict[str, Any]) -> None:
        seconds, error = result["seconds"], result.get("error", "").strip().splitlines()
        with lock:
            results.setdefault(part, {})[case] = result
            _write(results, out)
            print(f"{part}: {case}: {seconds:.1f} s{f': {error[-1]}' if error else ''}", flush=True)

    def collect(name: str, worker: Worker, most: float) -> None:
        if until <= time.monotonic():
            worker.kill()
            record(name, WHOLE, {"seconds": 0.0, "error": f"not run: the {limit:.0f} seconds of --limit were over"})
            return
        worker.start()
        for case, result in worker.cases(min(most, until - time.monotonic())):
            record(name, case, result)

    def workers_of(batch: list[str]) -> dict[str, Worker]:
        return {name: Worker(PARTS[name], device, tiny) for name in batch}

    waiting: dict[str, Worker] = {}
    beside = {"plan": Worker(PLAN, device, tiny)} if {"sdxl", "flux"} & set(names) else {}
    try:
        with ThreadPoolExecutor() as pool:
            plans = [pool.submit(collect, "plan", worker, PLAN.limit) for worker in beside.values()]
            batches = in_batches(names)
            waiting = workers_of(batches[0])
            for following in [*batches[1:], []]:
                running, waiting = waiting, {}
                found = [pool.submit(collect, name, worker, PARTS[name].limit) for name, worker in running.items()]
                waiting = workers_of(following)
                for one in found:
                    one.result()
            for one in plans:
                one.result()
    finally:
        for worker in [*waiting.values(), *beside.values()]:
            worker.kill()
    add_plans(results)
    _write(results, out)
    return results


def in_batches(names: list[str]) -> list[list[str]]:
    """Parts that run at once: one that needs the device alone, or consecutive ones that do not."""
    batches: list[list[str]] = []
    for name in names:
        if batches and not PARTS[name].alone and not PARTS[batches[-1][-1]].alone:
            batches[-1].append(name)
        else:
            batches.append([name])
    return batches


def add_plans(results: Results) -> None:
    """Adds to the measured peaks what was planned."""
    for name, plan in results.get("plan", {}).items():
        measured = results.get(name, {}).get("training", {})
        if "planned_bytes" in plan and "peak_bytes" in measured:
            measured["planned_bytes"] = plan["planned_bytes"]
            measured["planned_over_peak"] = plan["planned_bytes"] / measured["peak_bytes"]


def _write(results: Results, out: Path) -> None:
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(out)


def errors_of(results: Results) -> list[str]:
    """Which cases failed, as ``part: case``."""
    return [f"{part}: {case}" for part, cases in results.items() for case, one in cases.items() if "error" in one]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/gpu.json", help="the file of results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the code")
    given = parser.parse_args()
    failed = errors_of(run_all(given.parts, given.out, given.device, given.tiny, given.limit))
    if failed:
        print(f"{len(failed)} failed: {'; '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
