"""The console script in tests: in a process of its own, or in this one where its refusal is expected."""

from __future__ import annotations

import subprocess
import sys
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import yaml
from worlds import tiny_config

from fewstep.cli.main import main


def fewstep(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a new process."""
    command = [sys.executable, "-m", "fewstep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def exit_code(*arguments: object) -> object:
    """Runs a command in this process and returns its exit code."""
    before, sys.argv = sys.argv, ["fewstep", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as exit_:
            main()
    finally:
        sys.argv = before
    return exit_.value.code


def succeeds(*arguments: object, cwd: Path | None = None) -> str:
    """The standard output of a command that must succeed, run in this process because that is faster."""
    with redirect_stdout(StringIO()) as printed, chdir(cwd or "."):
        code = exit_code(*arguments)
    assert code == 0, printed.getvalue()
    return printed.getvalue()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that must fail with exit code 1 or 2, run in this process because that is faster."""
    assert exit_code(*arguments) in (1, 2)
    captured = capsys.readouterr()
    message = " ".join((captured.out + captured.err).split())
    assert "Traceback" not in message
    assert "unexpected;" not in message
    return message


def write_config(folder: Path, **changes: object) -> Path:
    """A run config of the tiny teacher."""
    file = folder / "config.yaml.txt"
    file.write_text(yaml.safe_dump(tiny_config(folder, **changes)))
    return file
