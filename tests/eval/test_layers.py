"""The evaluation package does not import distillation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fewstep.eval

ROOT = Path(fewstep.eval.__file__).parent


def test_all_modules_of_evaluation_are_imported_without_distillation() -> None:
    files = (file.relative_to(ROOT).with_suffix("") for file in ROOT.rglob("*.py"))
    modules = [".".join(("fewstep.eval", *file.parts)).removesuffix(".__init__") for file in files]
    assert len(modules) > 40
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules!r}]; "
        "loaded = [name for name in sys.modules if name.startswith('fewstep.distill')]; assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
