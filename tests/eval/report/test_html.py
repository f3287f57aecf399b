"""The page of the report contains what the run folder contains, and works if files are missing or damaged."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fewstep.core.errors import UserError
from fewstep.core.image_grid import comparison, save_grid, save_image, save_sample
from fewstep.eval.report.html import write_report

CONFIG = "teacher: fashion\nseed: 3\nstages:\n- objective: {name: tdm}\n  note: <script>alert(1)</script>\n"


def score(role: str, solver: str, nfe: int, value: float, **other: Any) -> dict[str, Any]:
    return {
        "model": "fashion" if role == "teacher" else "tdm", "role": role, "solver": solver, "nfe": nfe, "steps": nfe,
        "guidance": 1.0, "metric": "fd_fashion", "value": value, "n": 10000, "seed": 0, "seconds": 12.5,
        "reference": "fashion/test", "features_sha256": "0123456789abcdef" * 4,
    } | other  # fmt: skip


SCORES = [
    score("student", "student", 4, 4.0),
    score("teacher", "euler", 4, 10.0),
    score("teacher", "heun", 4, 8.0, guidance=2.0, steps=1),
    score("teacher", "euler", 8, 5.0),
    score("teacher", "euler", 32, 3.2),
]


def empty_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    return folder


def log(run: Path, *entries: dict[str, Any] | str) -> None:
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def report(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def text(page: str) -> str:
    """The visible text, with white space collapsed."""
    body = page[page.index("<body>") :]
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    run = empty_run(tmp_path / "tdm")
    (run / "environment.json").write_text(json.dumps({"processor": "slow & steady", "python": "3.11.2"}))
    steps = [
        {
            "step": s,
            "seconds": s / 4,
            "evaluations": 600 * s,
            "stage": s // 30,
            "loss/match": 1 / s,
            "grad_norm/student": 2.0,
            "health/std": 0.9,
        }
        for s in (10, 20, 30, 40)
    ]
    scored = [
        {"step": s, "seconds": s / 4, "evaluations": 600 * s, "validation": v}
        for s, v in ((20, 9.5), (30, 6.25), (40, 7.0))
    ]
    log(run, *steps, *scored)
    (run / "eval.json").write_text(json.dumps(SCORES))
    images = torch.arange(2 * 49, dtype=torch.uint8).reshape(2, 1, 7, 7)
    save_image(comparison([("teacher", images), ("student", images)]), run / "samples" / "comparison.png")
    for step in range(1, 21):
        save_grid(images, run / "samples" / f"step-{step:07d}.png", columns=2)
    return run


def test_the_summary_is_computed_from_the_files(full_run: Path) -> None:
    shown = text(report(full_run))
    assert "method tdm · teacher fashion · seed 3 · device slow &amp; steady" in shown
    assert "Trained for 40 steps and 24,000 network evaluations in 0 min 10 s." in shown
    assert (
        "Validation started at 9.500 at step 20, was best with 6.250 at step 30 and ended at 7.000 at step 40." in shown
    )
    assert "The student&#39;s best fd_fashion is 4.000 (student, 4 NFE, guidance 1, 10,000 samples)." in shown
    assert (
        "at the same NFE is 8.000 (heun, 4 NFE, guidance 2, 10,000 samples); the student&#39;s is 0.50 times" in shown
    )
    assert "at any NFE is 3.200 (euler, 32 NFE, guidance 1, 10,000 samples); the student&#39;s is 1.25 times" in shown
    assert "The teacher needs 32 NFE to match it." in shown


def test_the_page_loads_nothing(full_run: Path) -> None:
    """It has no addresses and no scripts; images are embedded, each with an alternative text."""
    page = report(full_run)
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    images = re.findall(r"<img ([^>]*)>", page)
    assert len(images) == 1 + 8
    assert all('src="data:image/png;base64,iVBOR' in image and re.search(r'alt="\w', image) for image in images)
    assert 'alt="Step 1"' in page
    assert 'alt="Step 20"' in page
    assert "8 of 20 images in samples/ are shown" in page


def test_text_from_files_is_escaped(full_run: Path) -> None:
    log(full_run, *({"step": step, "seconds": 1.0, "loss/<b>": 1.0} for step in (1, 2, 3)))
    page = report(full_run)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "loss/&lt;b&gt;" in page
    assert "loss/<b>" not in page


def test_the_page_is_well_formed_and_its_ids_are_unique(full_run: Path) -> None:
    page = report(full_run)
    opened: list[str] = []
    void = {"meta", "img", "br"}

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            opened.extend([tag] * (tag not in void))

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Check().feed(page)
    assert opened == []
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(ids)


def test_curves_are_grouped_by_the_name_before_the_slash_with_losses_first(full_run: Path) -> None:
    page = report(full_run)
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["Validation", "loss", "grad_norm", "health"]
    captions = re.findall(r"<figcaption>(.*?)</figcaption><svg", page)
    assert captions == [
        "fd_fashion ↓, 10,000 samples",
        *["validation"] * 3,
        "loss/match",
        "grad_norm/student",
        "health/std",
    ]
    for axis in ("training step", "seconds of training", "network evaluations in training"):
        assert f"validation against {axis}: validation from 9.5 to 7" in page
    assert "teacher euler from 10 to 3.2; teacher heun from 8 to 8; student from 4 to 4" in page


def rows(page: str) -> list[list[str]]:
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(<td.*?)</tr>", page)]


def test_the_table_shows_the_direction_and_the_reference_of_a_metric_and_its_best_value(full_run: Path) -> None:
    page = report(full_run)
    assert re.findall(r'scope="rowgroup">(.*?)<', page) == [
        "student tdm · student", "teacher fashion · euler", "teacher fashion · heun",
    ]  # fmt: skip
    assert re.findall(r'scope="col">(.*?)<', page)[3] == "fd_fashion ↓"
    assert [row[3] for row in rows(page)] == ["4.000", "10.00", "5.000", "<strong>3.200</strong>", "8.000"]
    assert "Against fashion/test, features 0123456789ab: fd_fashion." in text(page)


def test_the_page_of_an_empty_run_lists_what_is_missing(tmp_path: Path) -> None:
    page = report(empty_run(tmp_path / "fresh"))
    shown = text(page)
    assert "<h1>fresh</h1>" in page
    for remark in (
        "No training steps",
        "There are no scores",
        "no image samples/comparison.png",
        "compare_images(run) writes",
        "No sample images",
    ):
        assert remark in shown
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Settings"]


def test_damaged_entries_are_skipped_and_counted(full_run: Path) -> None:
    """An incomplete line, a line that is not an object, and a value that is not finite."""
    good = [{"step": step, "seconds": 5.0, "loss/match": 0.5} for step in (20, 21, 22)]
    log(full_run, '{"step": 10, "sec', "[1, 2]", *good, {**good[0], "step": 30, "loss/match": float("nan")}, "")
    (full_run / "eval.json").write_text("[{")
    (full_run / "samples" / "comparison.png").write_bytes(b"\x89PNG")
    page = report(full_run)
    assert "metrics.jsonl: 2 damaged lines skipped." in page
    assert "metrics.jsonl: 1 value not finite, omitted from the curves." in page
    assert "eval.json is damaged" in page
    assert "no readable image samples/comparison.png" in page
    assert "loss/match against training step: loss/match from 0.5 to 0.5" in page


def test_a_step_that_a_resumed_run_repeats_counts_once(tmp_path: Path) -> None:
    run = empty_run(tmp_path / "run")
    log(run, *({"step": s, "seconds": s / 1, "loss/match": v} for s, v in ((10, 3.0), (15, 4.0), (20, 9.0), (20, 2.0))))
    assert "loss/match from 3 to 2" in report(run)


def test_the_same_folder_gives_the_same_bytes(full_run: Path) -> None:
    assert write_report(full_run).read_bytes() == write_report(full_run).read_bytes()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.yaml"):
        write_report(tmp_path)


def test_what_scores_by_a_protocol_depend_on_is_shown_once(full_run: Path) -> None:
    manifest = {"protocol": {"name": "own", "size": 256}, "networks": {"inception_clean": "ab" * 32}}
    scores = [score("student", "student", k, 4.0, protocol="own", manifest=manifest) for k in (1, 2, 4)]
    (full_run / "eval.json").write_text(json.dumps(scores))
    shown = text(report(full_run))
    assert "What the scores depend on" in shown
    assert shown.count("inception_clean: " + "ab" * 32) == 1


def test_diversity_and_video_are_shown_if_they_exist(full_run: Path) -> None:
    assert "Several noises for one condition" not in text(report(full_run))
    images = torch.zeros(3, 1, 7, 7, dtype=torch.uint8)
    save_image(comparison([("class 0: student", images)]), full_run / "samples" / "diversity.png")
    (full_run / "samples" / "comparison.mp4").write_bytes(b"video")
    page = report(full_run)
    assert "Several noises for one condition" in text(page)
    assert '<video controls loop muted playsinline src="data:video/mp4;base64,dmlkZW8="></video>' in page
    save_sample(torch.stack([images[0], 255 - images[0]]), full_run / "samples" / "comparison.gif")
    assert "data:image/gif;base64," in report(full_run)


def test_every_image_is_enlarged_by_one_link_and_closed_by_another(full_run: Path) -> None:
    """Without a script: the link makes the figure the target of the page."""
    page = report(full_run)
    figures = re.findall(r'<figure id="(image-[\w-]+)".*?</figure>', page, re.DOTALL)
    assert len(figures) == len(set(figures)) == 1 + 8
    for name in figures:
        assert f'<a class="zoom" href="#{name}" aria-label="Enlarge: ' in page
    assert set(re.findall(r'<a class="close" href="#([\w-]+)"', page)) == {"same-noise", "samples"}


def test_a_sentence_and_a_chart_need_enough_data(tmp_path: Path) -> None:
    """Two points are no curve, and four records no diagnosis."""
    run = empty_run(tmp_path / "run")

    def logged(count: int) -> str:
        steps = range(10, 10 * count + 1, 10)
        entries = [{"step": s, "seconds": s / 1, "evaluations": s, "loss/match": 1.0, "health/std": 0.9} for s in steps]
        log(run, *entries, *({"step": s, "seconds": s / 1, "evaluations": s, "validation": 100 / s} for s in steps))
        return report(run)

    page = logged(2)
    assert "<svg" not in page
    assert "Validation was 10.00 at step 10, then 5.000 at step 20." in text(page)
    assert "2 records, too few for a diagnosis (at least 5)" in text(page)
    assert "no problems found" not in page
    assert logged(3).count("<svg") == 5
    assert "no problems found in the recorded diagnostics" in text(logged(5))


def test_scores_can_be_downloaded_as_json_and_as_csv(full_run: Path) -> None:
    page = report(full_run)
    files = dict(re.findall(r'<a download="([\w.]+)" href="data:[a-z/]+;base64,([^"]*)"', page))
    assert json.loads(base64.b64decode(files["scores.json"])) == SCORES
    lines = list(csv.DictReader(io.StringIO(base64.b64decode(files["scores.csv"]).decode())))
    assert [float(line["value"]) for line in lines] == [score["value"] for score in SCORES]
    assert lines[0]["metric"] == "fd_fashion"


def test_bias_and_error_stand_in_the_cell_of_their_value(full_run: Path) -> None:
    scores = [score("student", "student", 4, 4.0, bias=1.25), *SCORES[1:]]
    (full_run / "eval.json").write_text(json.dumps(scores))
    page = report(full_run)
    assert rows(page)[0][3] == "4.000<small>real samples ≈ 1.250</small>"
    assert "because they are so few" in text(page)
    assert "10,000 samples; as many random real samples score about 1.250)" in text(page)


def test_scores_without_a_common_number_of_samples_are_named_and_not_charted(full_run: Path) -> None:
    (full_run / "eval.json").write_text(json.dumps([score("student", "student", 4, 4.0, n=500), *SCORES[1:]]))
    shown = text(report(full_run))
    assert "so there is no chart of fd_fashion" in shown
    assert "fd_fashion ↓, 10,000 samples" not in shown


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("width", "target"), [(1900, ""), (1300, ""), (390, ""), (390, "#image-comparison")])
def test_a_browser_shows_the_page_on_wide_and_narrow_screens(
    full_run: Path, tmp_path: Path, width: int, target: str
) -> None:
    """The screenshot is not blank and as wide as the window."""
    file = write_report(full_run)
    screenshot = tmp_path / "page.png"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1600",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={screenshot}", f"{file.resolve().as_uri()}{target}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert screenshot.is_file(), done.stderr.decode()
    with Image.open(screenshot) as shown:
        assert shown.width == width
        assert len(shown.convert("L").getcolors() or range(1000)) > 20


MEASURE = """<script>
const boxes = [document.documentElement, ...document.querySelectorAll(".scroll")];
document.body.dataset.cut = JSON.stringify(boxes.map(box => box.scrollWidth - box.clientWidth));
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1900, 1300, 1030, 800, 390])
def test_nothing_of_the_page_and_its_table_is_cut(full_run: Path, tmp_path: Path, width: int) -> None:
    """Neither the page nor the box of the table is scrolled sideways, whatever the metrics and references."""
    names = ("fid", "kid", "precision", "recall", "precision_dinov2")
    more = [score("student", "student", 4, 0.4, metric=name, reference="coco-2017/val", error=0.01) for name in names]
    (full_run / "eval.json").write_text(json.dumps([*SCORES, *more]))
    page = write_report(full_run).read_text(encoding="utf-8").replace("</body>", MEASURE)
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # which forbids scripts
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1600",
        f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, text=True)
    found = re.search(r'data-cut="\[([^"]*)\]"', done.stdout)
    assert found is not None, done.stderr
    cut = [int(each) for each in found[1].split(",")]
    assert len(cut) > 1
    assert max(cut) <= 1, cut
