"""Previews of teacher and student in the report of a run."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fewstep.core.image_grid import comparison, save_image
from fewstep.eval.report.html import write_report


def test_previews_are_shown_by_step(tmp_path: Path) -> None:
    """At most eight, with the first and the last; a run without them has no such section."""
    (tmp_path / "config.yaml").write_text("teacher: fashion\nstages:\n- objective: {name: tdm}\n")
    assert 'id="previews"' not in write_report(tmp_path).read_text()
    images = torch.zeros(2, 1, 7, 7, dtype=torch.uint8)
    for step in range(10, 100, 10):
        image = comparison([("teacher", images), ("student", images)])
        save_image(image, tmp_path / "previews" / f"step-{step:07d}.png")
    page = write_report(tmp_path).read_text()
    shown = page[page.index('<section id="previews">') :]
    assert re.findall(r'id="(preview-\d+)"', shown) == [f"preview-{k}" for k in range(1, 9)]
    assert 'alt="Step 10"' in shown
    assert 'alt="Step 90"' in shown
    assert "8 of 9 images in previews/ are shown." in page
