"""Charts as parts of a page."""

from __future__ import annotations

from fewstep.eval.report.charts import Line, chart


def test_a_chart_is_svg_without_addresses_and_always_the_same() -> None:
    lines = [Line("teacher <euler>", [(4, 20.0), (8, 1.0)], "o-"), Line("student $x_$", [(4, 2.5)], "D")]
    caption, svg = chart("fd", "NFE", lines, y_axis="distance", log_x=True)
    assert (caption, svg) == chart("fd", "NFE", lines, y_axis="distance", log_x=True)
    assert svg.startswith("<svg viewBox=")
    assert "http" not in svg
    assert "fd against NFE: teacher &lt;euler&gt; from 20 to 1; student $x_$ from 2.5 to 2.5" in svg
    assert "currentColor" in svg
    assert "#123456" not in svg
    assert all(f">{label}</text>" in svg for label in ("NFE", "distance")), "both axes are labelled"


def test_a_chart_of_many_points_stays_small_and_keeps_the_extremes() -> None:
    """100,000 points with one spike become about 20 kB of text, whose y axis reaches the spike."""
    points = [(float(step), 100.0 if step == 77_777 else 1.0) for step in range(100_000)]
    svg = chart("loss/match", "step", [Line("loss/match", points)], y_axis="loss").svg
    assert len(svg) < 40_000
    assert ">100</text>" in svg
