"""Solvers from outside the package: by dotted name, registered in Python, installed as an entry point."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import refused, succeeds
from torch import Tensor
from worlds import FLOW, tiny_teacher

import fewstep
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.eval.solver_comparison import compare_solvers
from fewstep.models.model_config import FewStep
from fewstep.samplers.exponential import Noise
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import plan, steps_within
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import SOLVERS, FitRequest, FittedSolver, Rule, Solver, describe_solvers, find_solver

MODULE = """
from itertools import pairwise

from fewstep.samplers.solvers import Solver


def midpoint(predict, x, times):
    for t, t_next in pairwise(times):
        middle = (t + t_next) / 2
        x = x + (t_next - t) * predict(x + (middle - t) * predict(x, t).velocity, middle).velocity
    return x


MIDPOINT = Solver(midpoint, order=2, evaluations_per_step=2, paper="a textbook")
"""
ENTRY_POINTS = "[fewstep.solver]\ninstalled_midpoint = acme_solvers:MIDPOINT\n"


@pytest.fixture(autouse=True)
def _empty_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dotted name of the solver of a package that is installed with its entry point, but not imported."""
    (tmp_path / "acme_solvers.py").write_text(MODULE)
    metadata = tmp_path / "acme_solvers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-solvers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "acme_solvers:MIDPOINT"
    sys.modules.pop("acme_solvers", None)


def images(teacher: Path, solver: str, steps: int = 3) -> Tensor:
    config = fewstep.SamplingConfig(solver, steps, seed=1)
    return fewstep.sample(teacher, n=4, sampling=config, device="cpu")


def test_dotted_registered_and_installed_names_give_the_same_solver_and_samples(teacher: Path, installed: str) -> None:
    own = plan(fewstep.load(teacher), fewstep.SamplingConfig(installed, 3)).solver
    assert own.paper == "a textbook"
    fewstep.register("solver", "registered_midpoint")(own)
    expected = images(teacher, installed)
    for name in ("registered_midpoint", "installed_midpoint"):
        assert plan(fewstep.load(teacher), fewstep.SamplingConfig(name, 3)).solver is own
        assert torch.equal(images(teacher, name), expected)
    assert not torch.equal(images(teacher, "euler"), expected)


def test_a_copy_of_a_built_in_solver_gives_its_samples(teacher: Path) -> None:
    def my_ddpm(predict: Predictor, x: Tensor, times: Sequence[float], noise: Noise) -> Tensor:
        for t, t_next in pairwise(times):
            p = predict(x, t)
            d = t_next / t * (t**2 - ((1 - t) * t_next / (1 - t_next)) ** 2) ** 0.5 if t_next else 0.0
            x = (1 - t_next) * p.x0 + (t_next**2 - d**2) ** 0.5 * p.noise
            x = x + d * noise() if t_next else x
        return x

    fewstep.register("solver", "my_ddpm")(Solver(my_ddpm, 1, 1, "none", noisy=True))
    difference = images(teacher, "my_ddpm").int() - images(teacher, "ddpm").int()
    assert difference.abs().max() <= 1
    assert not torch.equal(images(teacher, "ddim"), images(teacher, "ddpm"))


def test_the_evaluations_of_an_own_solver_are_counted(teacher: Path, installed: str) -> None:
    model = fewstep.load(teacher)
    for guidance in (1.0, 2.0):
        steps = steps_within(installed, 13, guidance != 1, model.config)
        samples = generate(model, model.labels(2), fewstep.SamplingConfig(installed, steps, guidance))
        assert (steps, samples.nfe) == ((6, 12) if guidance == 1 else (3, 12))


def test_a_fitted_solver_of_your_own_reads_the_models_folder(tmp_path: Path) -> None:
    folder = tiny_teacher(tmp_path / "teacher")
    (folder / "rule.txt").write_text("unipc_2")

    def build(request: FitRequest) -> Rule:
        return SOLVERS[(request.folder / "rule.txt").read_text()].run

    fewstep.register("solver", "fitted")(FittedSolver(build, 2, "none"))
    found = find_solver("fitted", FitRequest(folder, 3))
    assert (found.order, found.evaluations_per_step, found.paper, found.name) == (2, 1, "none", "fitted")
    assert found.by_log_snr
    assert not found.noisy
    assert torch.equal(images(folder, "fitted"), images(folder, "unipc_2"))


def test_the_list_of_solvers_includes_registered_and_installed_ones(installed: str, tmp_path: Path) -> None:
    fewstep.register("solver", "registered_heun")(Solver(SOLVERS["heun"].run, 2, 2, "unpublished"))
    rows = {row[0]: row[1:] for row in describe_solvers()}
    assert list(rows)[:2] == ["euler", "ddim"]
    assert rows["registered_heun"] == ("2", "2", "unpublished", "")
    assert rows["installed_midpoint"] == ("2", "2", "a textbook", "")
    assert rows["dpm_solver_v3_2"] == ("2", "1", "arXiv 2310.13268; needs fewstep solver fit-v3", "")
    assert rows["sde_dpmpp_2m"][-1] == "dpmpp_2m_sde, dpmpp_2m_sde_gpu"
    file = tmp_path / "solvers.json"
    succeeds("solver", "list", "--json", file)
    assert {row["solver"] for row in json.loads(file.read_text())} == set(rows)


def test_invalid_own_solvers_are_refused(
    teacher: Path, installed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = fewstep.load(teacher)
    for name, message in (
        ("acme_solvers:midpoint", r"'acme_solvers:midpoint' is not a fewstep\.samplers\.solvers\.Solver"),
        ("acme_solvers:missing", "'acme_solvers:missing' cannot be imported: AttributeError"),
        ("installed_midpoit", "did you mean 'installed_midpoint'"),
    ):
        with pytest.raises(UserError, match=message):
            plan(model, fewstep.SamplingConfig(name, 3))
    few_step = FewStep(times=(1.0,), rule="renoise")
    student = model.model_copy(update={"config": model.config.model_copy(update={"few_step": few_step})})
    with pytest.raises(UserError, match="choose student, euler or ddim"):
        plan(student, fewstep.SamplingConfig(installed, 3))
    message = refused(capsys, "sample", teacher, "--solver", "acme_solvers:missing", "--out", tmp_path / "grid.png")
    assert "cannot be imported" in message


def test_an_own_solver_that_adds_noise_is_not_compared_with_a_long_run(teacher: Path, tmp_path: Path) -> None:
    fewstep.register("solver", "my_noisy")(Solver(SOLVERS["ddpm"].run, 1, 1, "none", noisy=True))
    model = fewstep.load(teacher)
    with pytest.raises(UserError, match="'my_noisy' adds noise"):
        compare_solvers(
            model, model.labels(2), None, tmp_path, name="teacher", solvers=["my_noisy"], nfe=[4], grids=["time"],
            guidance=1.0, long=8, seed=0,
        )  # fmt: skip


def test_evaluations_are_counted_without_a_model(installed: str) -> None:
    assert find_solver(installed, FitRequest(Path(), 3)).count_evaluations(FLOW, (1.0, 0.5, 0.2, 0.0)) == 6
    assert SOLVERS["heun"].count_evaluations(FLOW, (1.0, 0.5, 0.2, 0.0)) == 5
    assert SOLVERS["ddpm"].count_evaluations(FLOW, (1.0, 0.5, 0.2, 0.0)) == 3
    assert SOLVERS["seeds_2"].count_evaluations(FLOW, (0.9, 0.5, 0.2, 0.0)) == 5, "noise, too"
