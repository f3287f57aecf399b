"""The Dockerfile, as far as it can be checked without building an image: its syntax, files, arguments and user. The
files that reach the build are enough for a whole wheel."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from commands import fewstep

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """Each instruction with its arguments, without comments, in one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


STEPS = instructions()
LAST = STEPS[max(k for k, (name, _) in enumerate(STEPS) if name == "FROM") :]


def test_every_instruction_is_known_and_every_command_parses() -> None:
    assert {name for name, _ in STEPS} <= KNOWN
    for name, arguments in STEPS:
        if name == "RUN":
            done = subprocess.run(["sh", "-n", "-c", arguments], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        if name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(arguments))


def test_files_and_arguments_exist() -> None:
    stages = [match[1] for name, text in STEPS if name == "FROM" and (match := re.search(r" AS (\w+)$", text))]
    for name, text in STEPS:
        if name == "COPY":
            sources = [word for word in text.split()[:-1] if not word.startswith("--")]
            origin = re.match(r"--from=(\w+)", text)
            assert origin[1] in stages if origin else all((ROOT / source).exists() for source in sources)
    names = {text.partition("=")[0] for name, text in STEPS if name == "ARG"}
    rest = " ".join(text for name, text in STEPS if name != "ARG")
    assert names == {name for name in re.findall(r"\$\{?(\w+)", rest) if name != "PWD"}
    defaults = dict(text.split("=", 1) for name, text in STEPS if name == "ARG")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(defaults["EXTRAS"].split(",")) <= set(extras)


def test_the_image_runs_as_an_ordinary_user_and_shows_the_help() -> None:
    settings = dict(LAST)
    assert settings["USER"] not in ("root", "0")
    assert f"useradd --create-home {settings['USER']}" in settings["RUN"]
    command = json.loads(settings["ENTRYPOINT"]) + json.loads(settings["CMD"])
    assert command == ["fewstep", "--help"]
    assert "Usage:" in fewstep(*command[1:]).stdout


def test_any_user_can_write_caches_and_has_a_name() -> None:
    """With ``--user`` the user is unknown to the system, and owns neither the home nor ``/work``."""
    settings = dict(LAST)
    variables = dict(word.split("=", 1) for word in settings["ENV"].split())
    assert variables["HOME"] == f"/home/{settings['USER']}"
    assert f"chmod 1777 {variables['HOME']} " in settings["RUN"]
    assert settings["RUN"].endswith(f"--mode 1777 {settings['WORKDIR']}")
    program = "import getpass; print(getpass.getuser())"
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True)
    assert done.stdout == f"{settings['USER']}\n"


def test_the_commands_in_its_comments_use_its_arguments_and_commands() -> None:
    comments = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("#")]
    names = {text.partition("=")[0] for name, text in STEPS if name == "ARG"}
    used = re.findall(r"--build-arg (\w+)=", "\n".join(comments))
    assert used
    assert set(used) <= names
    for line in comments:
        if found := re.search(r" fewstep ((?:app|demo)\b.*)$", line):
            done = fewstep(*found[1].split()[:1], "--help")
            assert done.returncode == 0
            assert all(option in done.stdout for option in re.findall(r"--\w+", found[1]))


def test_what_reaches_the_build_makes_a_whole_wheel(tmp_path: Path) -> None:
    pytest.importorskip("build")
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*", "only what is named reaches the build"
    source = tmp_path / "source"
    source.mkdir()
    for name in (line[1:] for line in lines if line.startswith("!")):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    done = subprocess.run(build, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    needed = ("api/app.css", "models/bundled/fashion/model.safetensors", "eval/report/report.html")
    assert {f"fewstep/{name}" for name in (*needed, "configs/fashion/demo.yaml", "distill/loop.py")} <= names
    assert all((source / text.split()[0]).exists() for name, text in STEPS if name == "COPY" and text[0] != "-")
