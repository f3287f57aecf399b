"""``docs/notebook.ipynb`` runs from its first cell to its last, and is stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("FEWSTEP_NOTEBOOK_STEPS", "2")
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", ()) if "data" in output]
    assert len([output for output in shown if "image/png" in output["data"]]) == 3, "comparison, losses, export"
    made = {str(file.relative_to(tmp_path / "runs/notebook")) for file in (tmp_path / "runs/notebook").rglob("*")}
    assert {"run/report.html", "student/model_index.json", "student/samples.png"} <= made
    lines = (tmp_path / "runs/notebook/run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
