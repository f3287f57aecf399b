"""The commands about solvers, on a tiny teacher: what they write, and that what they measured is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from worlds import tiny_teacher

from fewstep import sample
from fewstep.core.errors import UserError
from fewstep.eval.solver_comparison import at_their_best, cells, read_lines
from fewstep.samplers.dc_solver import Searched


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_teacher(folder)
    make.make_statistics(folder, folder / "statistics.safetensors", n=8, intervals=12, device="cpu")
    make.search_ratios(folder, folder / "dc_solver.json", steps=[4, 6], guidance=[1.0, 2.0], n=4, device="cpu")
    return folder


def test_a_sweep_writes_a_table_and_a_figure_of_every_solver_at_its_best(teacher: Path, tmp_path: Path) -> None:
    solvers = ["ddim", "heun", "unipc_2", "dpm_solver_v3_2", "dc_solver_2"]
    lines = measure.sweep(
        teacher,
        solvers=solvers,
        nfe=[4, 6],
        grids=["time", "log_snr:0.05"],
        n=4,
        long=60,
        folder=tmp_path,
        device="cpu",
    )
    assert len(lines) == 20
    assert all(line.nfe <= line.budget for line in lines)
    assert read_lines(tmp_path / "sweep.json") == lines
    best = at_their_best(lines)
    assert len(best) == 10
    assert len({(line.solver, line.grid) for line in best}) == 5
    by_solver = {line.solver: line.error for line in best if line.budget == 6}
    assert by_solver["unipc_2"] < by_solver["ddim"]
    table = cells(best)
    assert table[0] == ["solver", "grid", "4 NFE", "6 NFE", "geometric mean"]
    assert (tmp_path / "sweep.md").read_text().count("\n") == 2 + 5
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 500


def test_a_sweep_goes_on_where_it_stopped_and_takes_more_solvers(teacher: Path, tmp_path: Path) -> None:
    settings = {"nfe": [4], "n": 4, "long": 40, "folder": tmp_path, "device": "cpu"}

    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert done <= total == 40 + 3 * 4
        if done > 40 + 4:
            raise Enough

    with pytest.raises(Enough):
        measure.sweep(teacher, solvers=["ddim", "unipc_2", "heun"], progress=stop, **settings)
    assert [line.solver for line in read_lines(tmp_path / "sweep.json")] == ["ddim"]
    marked = [{**line.model_dump(), "error": 7.0} for line in read_lines(tmp_path / "sweep.json")]
    (tmp_path / "sweep.json").write_text(json.dumps(marked))
    lines = measure.sweep(teacher, solvers=["ddim", "unipc_2"], **settings)
    assert lines[0].error == 7.0, "what is there is not computed again"
    assert lines[1].error < 1
    assert len(measure.sweep(teacher, solvers=["heun"], **settings)) == 1
    assert {line.solver for line in read_lines(tmp_path / "sweep.json")} == {"ddim", "unipc_2", "heun"}
    with pytest.raises(UserError, match="a sweep of other settings"):
        measure.sweep(teacher, solvers=["ddim"], seed=1, **settings)


def test_what_was_measured_is_found_beside_the_model_and_asked_for_where_it_is_not(
    teacher: Path, tmp_path: Path
) -> None:
    for solver in ("dpm_solver_v3_2", "dpm_solver_v3_3", "dc_solver_2"):
        assert sample(teacher, n=2, solver=solver, steps=4, device="cpu").shape[0] == 2
    sample(teacher, n=2, solver="dc_solver_2", steps=5, guidance=1.5, device="cpu")  # between those searched
    with pytest.raises(UserError, match="no ratios near 9 steps at guidance 1"):
        sample(teacher, n=2, solver="dc_solver_2", steps=9, device="cpu")
    bare = tmp_path / "bare"
    tiny_teacher(bare)
    with pytest.raises(UserError, match="make them with fewstep ems"):
        sample(bare, n=2, solver="dpm_solver_v3_2", steps=4, device="cpu")
    with pytest.raises(UserError, match="search them with fewstep ratios"):
        sample(bare, n=2, solver="dc_solver_2", steps=4, device="cpu")
    found = [Searched.model_validate(one) for one in json.loads((teacher / "dc_solver.json").read_text())]
    assert [(one.steps, one.guidance) for one in found] == [(4, 1.0), (6, 1.0), (4, 2.0), (6, 2.0)]
    assert all(one.ratios[:2] == [1.0, 1.0] and len(one.ratios) == one.steps for one in found)


def test_what_cannot_be_compared_is_refused_before_anything_is_sampled(teacher: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ({"solvers": ["unipc2"]}, "did you mean 'unipc_2'"),
        ({"solvers": ["ddim"], "grids": ["karas"]}, "did you mean 'karras'"),
        ({"solvers": ["heun"], "guidance": 2.0, "nfe": [1]}, "too few for one step"),
        ({"solvers": ["ddim", "ddpm"]}, "'ddpm' adds noise of its own"),
        ({"solvers": ["dc_solver_2"], "nfe": [20]}, "no ratios near 20 steps"),
    ):
        with pytest.raises(UserError, match=message):
            measure.sweep(teacher, **{"nfe": [4], "folder": tmp_path / "no", **arguments})
    assert not (tmp_path / "no").exists()
