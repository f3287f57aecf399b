"""Breaks the code on purpose, one small change at a time (mutmut), and counts the changes that the tests notice.

    python benchmarks/mutants.py --json results/mutants.json --tests tests/distill -- distill/matching.py

runs in a copy of the checkout in build/mutants. The JSON file keeps the counts of other files; of these it has how many
changes were noticed (a test failed, or ran into the time limit), and the ``survivors``, as the lines removed and added.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPY = ROOT / "build" / "mutants"
CACHE = re.compile(r"^@(lru_cache\(.*\)|cache)\n", re.MULTILINE)
COPIED = ("tests", "benchmarks", "examples", "docs", "results", "configs", "pyproject.toml", "README.md")
SETTINGS = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {files}
also_copy = {also_copy}
pytest_add_cli_args = ["--hypothesis-seed=0"]
pytest_add_cli_args_test_selection = {tests}
"""


def prepare(files: list[str], tests: list[str]) -> None:
    """Copies the checkout, with folders instead of the links in src, which mutmut does not follow, and without caches:
    a cached result would hide a change, and mutmut leaves functions with a decorator alone."""
    shutil.rmtree(COPY, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", COPY / "src", symlinks=False, ignore=ignored)
    for file in files:
        path = COPY / "src" / "fewstep" / file
        path.write_text(CACHE.sub("", path.read_text()))
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, COPY / name, ignore=ignored)
        else:
            shutil.copy(source, COPY / name)
    also_copy = [name for name in COPIED if name not in ("tests", "pyproject.toml")]
    only = [f"src/fewstep/{file}" for file in files]
    with (COPY / "pyproject.toml").open("a", encoding="utf-8") as settings:
        settings.write(
            SETTINGS.format(files=json.dumps(only), tests=json.dumps(tests), also_copy=json.dumps(also_copy))
        )


def mutmut(*arguments: str) -> str:
    """The output of a mutmut command in the copy."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"mutmut {arguments[0]} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def change(name: str) -> str:
    """The removed and added lines of a mutant."""
    lines = mutmut("show", name).splitlines()
    return "\n".join(line for line in lines if line.startswith(("+", "-")) and not line.startswith(("+++", "---")))


def results(file: str) -> tuple[dict[str, float], list[str]]:
    """The counts of one file, and its survivors."""
    module = "fewstep." + file.removesuffix(".py").replace("/", ".")
    found = [line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "true").splitlines() if ": " in line]
    own = {name: status for name, status in found if name.rsplit(".", 1)[0] == module}
    survivors = [name for name, status in own.items() if status not in ("killed", "timeout")]
    noticed = len(own) - len(survivors)
    counts = {"changes": len(own), "noticed": noticed, "share": round(noticed / max(1, len(own)), 3)}
    return counts, [change(name) for name in survivors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="relative to src/fewstep")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files or folders; those that take seconds")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--processes", default="2")
    arguments = parser.parse_args()
    for file in arguments.files:
        if not (ROOT / "src" / "fewstep" / file).is_file():
            sys.exit(f"There is no file src/fewstep/{file}.")
    prepare(arguments.files, arguments.tests)
    mutmut("run", "--max-children", arguments.processes)
    known = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"files": {}, "survivors": {}}
    for file in arguments.files:
        known["files"][file], known["survivors"][file] = results(file)
        print(f"{file}: {known['files'][file]['noticed']} of {known['files'][file]['changes']} changes noticed")
    arguments.json.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
