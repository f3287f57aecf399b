"""The report counts what disturbed a run."""

from __future__ import annotations

from pathlib import Path

from fewstep.eval.report.html import disturbances, write_report


def test_resumptions_and_lost_updates_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("teacher: fashion\n")
    assert disturbances(tmp_path) == []
    (tmp_path / "resumes.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"st')
    (tmp_path / "lost_updates.jsonl").write_text('{"update": "fake", "step": 8, "cause": "loss/critic is nan"}\n')
    shown = ["Resumed 2 times (resumes.jsonl).", "1 update not applied (lost_updates.jsonl)."]
    assert disturbances(tmp_path) == shown
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert all(sentence in page for sentence in shown)
