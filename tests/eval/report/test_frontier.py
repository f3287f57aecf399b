"""The figure of a comparison of objectives."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fewstep.eval.report.frontier import draw_frontier
from fewstep.eval.score_files import Score

SOLVERS = ("euler", "heun", "ddim", "dpmpp_2m", "unipc_2", "dpm_solver_v3_2")


def score(model: str, solver: str, nfe: int, value: float) -> Score:
    return Score(
        model=model, role="student" if solver == "student" else "teacher", solver=solver, nfe=nfe, steps=nfe,
        guidance=1.0, metric="fd_fashion", value=value, n=100, seed=0, seconds=1.0, reference="r", features_sha256="ab",
    )  # fmt: skip


def test_every_method_and_every_solver_of_the_teacher_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver's line has the best guidance for each NFE."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **settings: figures.append(figure))
    teachers = [
        score("fashion", solver, nfe, factor / nfe) for solver in SOLVERS for nfe in (8, 4) for factor in (2, 1)
    ]
    curves = {"tdm": [[(100.0, 2.0), (200.0, 1.0)], [(100.0, 2.2), (200.0, 1.2)]]}
    draw_frontier([score("tdm", "student", 4, 0.5), *teachers], curves, tmp_path / "frontier.png")
    _, sampling = figures[0].axes
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["tdm"]
    handles, labels = sampling.get_legend_handles_labels()
    assert labels == [f"teacher, {solver}" for solver in SOLVERS]
    assert all(line.get_xydata().tolist() == [[4, 0.25], [8, 0.125]] for line in handles)
