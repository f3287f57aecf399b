"""The training command under ckpt-chaos, a package of another author that kills a job at its file events."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

POINTS = 32
MODES = "before,torn,term,unsynced"


def check_with_ckpt_chaos(inputs: Path, folder: Path) -> dict[str, Any]:
    """The number of its crash points by verdict: PASS is a resumed run with equal weights from the newest checkpoint.

    Each is two new processes. ``unsynced`` also reverts every file to what ``fsync`` had confirmed.
    """
    if importlib.util.find_spec("ckpt_chaos") is None:
        sys.exit("ckpt_chaos: pip install ckpt-chaos first.")
    python, config = sys.executable, inputs / "train.yaml"
    start = f"{python} -m fewstep train {config} out={{out}}/run"
    resumes = "{out}/run/resumes.jsonl"
    resume = f"{python} -m fewstep train --resume {{out}}/run || exit 1; test ! -f {resumes} || tail -n 1 {resumes}"
    work = folder / "ckpt_chaos"
    command = [
        python, "-m", "ckpt_chaos", "run", "--work", str(work), "--max-points", str(POINTS), "--modes", MODES,
        "--resume-cmd", f"sh -c 'if test -f {{out}}/run/config.yaml; then {resume}; else {start}; fi'",
        "--result-file", "{out}/run/student/model.safetensors", "--checkpoint-glob", "{out}/run/checkpoints/step-*",
        "--step-regex", r'"step": (\d+)', "--ckpt-ignore-size", "--", *start.split(), "checkpoint.keep=9",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"RANK": "0"})
    print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
    verdicts = {name: int(count) for name, count in re.findall(r"([A-Z_]+): (\d+)", done.stdout.splitlines()[-1])}
    return {"version": importlib.metadata.version("ckpt-chaos"), "points": sum(verdicts.values()), **verdicts}
