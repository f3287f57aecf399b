"""Comparing solvers on a tiny teacher, and the measured files that some of them need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from worlds import tiny_teacher

from fewstep import sample
from fewstep.api import solvers
from fewstep.core.errors import UserError
from fewstep.eval.solver_comparison import best_grids, read_results, table_rows
from fewstep.samplers.dc_solver import SearchedRatios
from fewstep.samplers.plan import SamplingConfig


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher(folder)
    solvers.fit_v3(folder, folder / "statistics.safetensors", n=8, intervals=12, device="cpu")
    solvers.fit_dc(folder, folder / "dc_solver.json", steps=[4, 6], guidance=[1.0, 2.0], n=4, device="cpu")
    return folder


def test_a_comparison_writes_a_table_and_a_figure_of_every_solver_on_its_best_grid(
    teacher: Path, tmp_path: Path
) -> None:
    names = ["ddim", "heun", "unipc_2", "dpm_solver_v3_2"]
    results = solvers.compare_solvers(
        teacher, solvers=names, nfe=[4, 6], grids=["time", "log_snr:0.05"], n=4, long=60, folder=tmp_path, device="cpu"
    )
    assert len(results) == 16
    assert all(result.nfe <= result.budget for result in results)
    assert read_results(tmp_path / "solvers.json") == results
    best = best_grids(results)
    assert len(best) == 8
    assert len({(result.solver, result.grid) for result in best}) == 4
    by_solver = {result.solver: result.error for result in best if result.budget == 6}
    assert by_solver["unipc_2"] < by_solver["ddim"]
    table = table_rows(best)
    assert table[0] == ["solver", "grid", "4 NFE", "6 NFE", "geometric mean"]
    assert (tmp_path / "solvers.md").read_text().count("\n") == 2 + 4
    with Image.open(tmp_path / "solvers.png") as image:
        assert image.width > 500


def test_a_comparison_continues_where_it_stopped_and_accepts_more_solvers(teacher: Path, tmp_path: Path) -> None:
    settings = {"nfe": [4], "n": 4, "long": 40, "folder": tmp_path, "device": "cpu"}

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert done <= total == 40 + 3 * 4
        if done > 40 + 4:
            raise Stopped

    with pytest.raises(Stopped):
        solvers.compare_solvers(teacher, solvers=["ddim", "unipc_2", "heun"], progress=stop, **settings)
    assert [result.solver for result in read_results(tmp_path / "solvers.json")] == ["ddim"]
    marked = [{**result.model_dump(), "error": 7.0} for result in read_results(tmp_path / "solvers.json")]
    (tmp_path / "solvers.json").write_text(json.dumps(marked))
    results = solvers.compare_solvers(teacher, solvers=["ddim", "unipc_2"], **settings)
    assert results[0].error == 7.0, "known results are not computed again"
    assert results[1].error < 1
    assert len(solvers.compare_solvers(teacher, solvers=["heun"], **settings)) == 1
    assert {result.solver for result in read_results(tmp_path / "solvers.json")} == {"ddim", "unipc_2", "heun"}
    with pytest.raises(UserError, match="a comparison with other settings"):
        solvers.compare_solvers(teacher, solvers=["ddim"], seed=1, **settings)
    other = tmp_path / "other" / teacher.name
    tiny_teacher(other, seed=5)
    with pytest.raises(UserError, match="or of another model; choose another --out"):
        solvers.compare_solvers(other, solvers=["ddim"], **settings)


def test_measured_files_are_found_beside_the_model_and_named_if_missing(teacher: Path, tmp_path: Path) -> None:
    def images(model: Path, solver: str, steps: int, guidance: float = 1.0) -> int:
        return len(sample(model, n=2, sampling=SamplingConfig(solver, steps, guidance), device="cpu"))

    for solver in ("dpm_solver_v3_2", "dpm_solver_v3_3", "dc_solver_2"):
        assert images(teacher, solver, 4) == 2
    assert images(teacher, "dc_solver_2", 5, 1.5) == 2, "between the searched scales"
    with pytest.raises(UserError, match="no ratios near 9 steps at guidance 1"):
        images(teacher, "dc_solver_2", 9)
    bare = tmp_path / "bare"
    tiny_teacher(bare)
    with pytest.raises(UserError, match="run fewstep solver fit-v3"):
        images(bare, "dpm_solver_v3_2", 4)
    with pytest.raises(UserError, match="run fewstep solver fit-dc"):
        images(bare, "dc_solver_2", 4)
    found = [SearchedRatios.model_validate(each) for each in json.loads((teacher / "dc_solver.json").read_text())]
    assert [(each.steps, each.guidance) for each in found] == [(4, 1.0), (6, 1.0), (4, 2.0), (6, 2.0)]
    assert all(each.ratios[:2] == [1.0, 1.0] and len(each.ratios) == each.steps for each in found)


def test_invalid_comparisons_are_refused_before_sampling(teacher: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"solvers": ["unipc2"]}, "did you mean 'unipc_2'"),
        ({"solvers": ["ddim"], "grids": ["karas"]}, "did you mean 'karras'"),
        ({"solvers": ["heun"], "guidance": 2.0, "nfe": [1]}, "too few for one step"),
        ({"solvers": ["ddim", "ddpm"]}, "'ddpm' adds noise"),
        ({"solvers": ["dc_solver_2"], "nfe": [20]}, "no ratios near 20 steps"),
        ({"solvers": ["dc_solver_2"], "grids": ["log_snr:0.05"]}, "searched on the grid time"),
        ({"solvers": ["ddim"], "grids": ["time", "times:1,0.5"]}, "'times:1,0.5' has one number of steps"),
        ({"solvers": ["unipc_3"], "grids": ["log_snr:0.001"], "nfe": [20], "long": 20}, "is the long run itself"),
        ({"solvers": ["unipc_3"], "grids": ["exponential"], "nfe": [20], "long": 20}, "is the long run itself"),
    ):
        with pytest.raises(UserError, match=message):
            solvers.compare_solvers(teacher, **{"nfe": [4], "folder": tmp_path / "no", **arguments})
    assert not (tmp_path / "no").exists()
