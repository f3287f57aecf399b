"""The package as a whole: what a wheel contains, what importing it does, what the repository must not contain."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "fewstep"
OBJECTIVES = sorted(file.stem for file in (ROOT / "distill" / "objectives").glob("*.py") if file.stem != "__init__")
SHARED = ("build", "checkpoint", "config", "loop", "roles", "run_folder", "stage", "trainer", "update")

IMPORT_ALL = """
import importlib, pkgutil
import fewstep

modules = [fewstep]
for package in modules:
    for found in pkgutil.iter_modules(getattr(package, "__path__", []), package.__name__ + "."):
        if found.name not in ("fewstep.models.hub", "fewstep.samplers.diffusers_scheduler"):  # diffusers
            modules.append(importlib.import_module(found.name))
assert len(modules) > 20, modules
"""


def python(code: str, *arguments: object, path: Path) -> None:
    """Runs ``code`` in a fresh process that finds ``fewstep`` in ``path`` and has no display."""
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=path, env=env | {"PYTHONPATH": str(path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def plain_copy(to: Path) -> Path:
    """The package's Python files and configs with the links resolved; returns the folder to import it from."""
    shutil.copytree(PACKAGE, to / "fewstep", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    return to


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``plain_copy`` that several tests share, so that it is compiled once."""
    return plain_copy(tmp_path_factory.mktemp("site"))


def test_a_wheel_is_whole_and_works_outside_the_repository(tmp_path: Path) -> None:
    leftovers = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=leftovers)  # a build writes into its source
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run(build, cwd=tmp_path / "source", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = set(archive.namelist())

    assert {name.split("/")[0].split("-")[0] for name in names} == {"fewstep"}, "something is installed beside fewstep"
    for folder in (".", "api", "cli", "core", "configs", "models", "distill", "samplers", "eval"):
        expected = {
            f"fewstep/{folder}/{file.relative_to(PACKAGE / folder)}".replace("/./", "/")
            for file in (PACKAGE / folder).rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        }
        assert expected
        assert expected <= names, f"missing in the wheel: {sorted(expected - names)}"
    where = "import sys, fewstep; assert fewstep.__file__.startswith(sys.argv[1]), fewstep.__file__\n"
    python(where + IMPORT_ALL, tmp_path / "site", path=tmp_path / "site")


def test_the_core_imports_no_optional_library(tmp_path: Path) -> None:
    optional = ["diffusers", "peft", "torchvision", "open_clip", "cleanfid", "xformers", "wandb", "tensorboard"]
    optional += ["av", "bitsandbytes", "mkdocs", "importlinter", "datasets", "pyarrow", "pandas"]
    for name in optional:  # empty stand-ins, so that a guarded import shows too
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    check = "\nimport sys\nfound = set(sys.argv[1:]) & set(sys.modules)\nassert not found, found"
    python(IMPORT_ALL + check, *optional, path=plain_copy(tmp_path))


def test_importing_saving_and_sampling_touch_no_network(tmp_path: Path) -> None:
    """Invariant 8: nothing is downloaded, logged in or sent."""
    listen = """
import sys
asked = []
events = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"}
sys.addaudithook(lambda event, arguments: asked.append((event, arguments)) if event in events else None)
"""
    use = """
backbone = {"name": "unet", "widths": [8], "blocks": [1], "patch": 2, "embedding": 8, "heads": 1}
config = fewstep.ModelConfig(backbone=backbone, shape=(1, 8, 8), classes=2)
fewstep.save_model(config.build(), config, sys.argv[1])
sampling = fewstep.SamplingConfig("euler", steps=2, guidance=2.0)
images = fewstep.sample(sys.argv[1], n=2, labels=[0, 1], sampling=sampling, device="cpu")
assert images.shape == (2, 1, 8, 8), images.shape
assert not asked, asked
"""
    python(listen + IMPORT_ALL + use, tmp_path / "model", path=PACKAGE.parent)


def test_tracked_files_name_no_place_on_a_machine() -> None:
    place = re.compile(r"(?<![\w.}/])/(home/\w+|Users/\w+|root|tmp|work)/|file://|index-url")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if not name.startswith("tests/") and b"\0" not in data:
            lines = data.decode(errors="replace").splitlines()
            found += [f"{name}: {line.strip()}" for line in lines if place.search(line)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", SHARED)
def test_shared_files_name_no_method_and_no_family(module: str) -> None:
    """Invariant 5, first half."""
    names = "|".join([*OBJECTIVES, "dmd", "tdm", "cdm", "sdxl", "flux", "wan", "qwen", "pixart"])
    text = (ROOT / "distill" / f"{module}.py").read_text(encoding="utf-8")
    found = re.findall(rf"(?i)^.*(?<![a-z0-9])(?:{names})(?![a-z0-9]).*$", text, re.MULTILINE)
    assert not found, found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_deleting_an_objective_breaks_nothing_else(objective: str, site: Path, tmp_path: Path) -> None:
    """Invariant 5, second half: all other modules import, all configs that do not use it load."""
    load = """
import sys
from pathlib import Path
import yaml
from fewstep.distill.config_files import CONFIGS, load_config

for file in CONFIGS.rglob("*.yaml"):
    stages = yaml.safe_load(file.read_text()).get("stages", [])
    used = {s["objective"] if isinstance(s["objective"], str) else s["objective"]["name"] for s in stages}
    if stages and sys.argv[1] not in used:
        load_config(file)
"""
    file = site / "fewstep" / "distill" / "objectives" / f"{objective}.py"
    file.rename(tmp_path / file.name)
    try:
        python(IMPORT_ALL + load, objective, path=site)
    finally:
        (tmp_path / file.name).rename(file)


def test_the_public_names_exist_and_are_documented(tmp_path: Path) -> None:
    check = """
import inspect
import fewstep

assert set(fewstep.__all__) <= set(dir(fewstep))
for name in fewstep.__all__:
    assert inspect.getdoc(getattr(fewstep, name)), name
try:
    fewstep.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""
    python(check, path=PACKAGE.parent)


def test_imports_point_one_way() -> None:
    """The contracts in pyproject.toml; ``make lint`` checks them too."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-logo"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "0 broken" in done.stdout, done.stdout + done.stderr


def test_no_file_is_long() -> None:
    listed = [file for folder in ("src/fewstep", "tests", "benchmarks", "examples") for file in walk(ROOT / folder)]
    assert len(listed) > 150
    long = {str(file.relative_to(ROOT)): n for file in listed if (n := len(file.read_text().splitlines())) > 350}
    assert not long


def walk(folder: Path) -> list[Path]:
    """Python files, through links."""
    return [
        Path(top) / name
        for top, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
