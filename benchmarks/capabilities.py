"""Writes docs/capabilities.md from the results of tests/models/hub: ``python benchmarks/capabilities.py`` (minutes).

A tick is a test that passed on a tiny random pipeline, a dash a combination that is refused, a blank a missing test.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "capabilities.md"
DATA_FREE, PREFERENCES = "test_every_data_free_objective_trains_a_pipeline", "test_every_family_learns_from_pairs"
COLUMNS = {
    "samples as its pipeline": r"test_sampling_equals_the_pipelines_own\[{family}-",
    "to pixels": r"test_from_words_to_pixels_equals_the_pipelines_own\[{family}\]",
    "copies": r"test_a_family_trains_and_its_student_comes_back\[{family}-copies\]",
    "adapters": r"test_a_family_trains_and_its_student_comes_back\[{family}-adapters\]",
    "preference pairs": PREFERENCES + r"\[{family}-",
    "checkpointing": r"test_recomputing_activations_changes_no_gradient\[{family}-",
    "export diffusers": r"test_the_exported_pipelines_default_call_samples_as_the_student\[{family}-",
    "lora": r"test_exported_adapters_and_networks_pass_their_check\[{family}-lora\]",
    "comfyui": r"test_exported_adapters_and_networks_pass_their_check\[{family}-comfyui\]",
}
REFUSED = {("pixart", "comfyui"): "–"}


def results() -> dict[str, bool]:
    """The tests of tests/models/hub by name, and whether each passed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "models" / "hub"), f"--junitxml={file}"]
        subprocess.run(command, cwd=ROOT, check=False)
        cases = ElementTree.parse(file).iter("testcase")
        return {str(case.get("name")): not list(case) for case in cases}


def table(head: list[str], rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *rows])


def page(passed: dict[str, bool]) -> str:
    def mark(pattern: str) -> str:
        found = [ok for name, ok in passed.items() if re.match(pattern, name)]
        return "✓" if found and all(found) else "fails" if found else ""

    families = list(dict.fromkeys(re.findall(r"test_sampling_equals_the_pipelines_own\[(\w+)-", "\n".join(passed))))
    data_free = dict.fromkeys(re.findall(rf"{DATA_FREE}\[(\w+)-", "\n".join(passed)))
    tests = {objective: rf"{DATA_FREE}\[{objective}" for objective in data_free}
    tests["diffusion_dpo"] = rf"{PREFERENCES}\[sd"
    by_family = [
        [f, *(REFUSED.get((f, name)) or mark(p.format(family=f)) for name, p in COLUMNS.items())] for f in families
    ]
    by_objective = [
        [f"`{objective}`", *(mark(rf"{test}-{mode}\]") for mode in MODES)] for objective, test in tests.items()
    ]
    return (
        "# What has been tested on pipelines\n\n"
        "Generated from test results by `python benchmarks/capabilities.py`: a tick is a test that passed on a tiny\n"
        "random pipeline of diffusers' own classes; a dash is a combination that is refused with a reason. Nothing\n"
        "here was run at real size. [What the columns mean](testing.md#pipelines).\n\n"
        "Families, each trained for two steps with `tdm`:\n\n"
        + table(["family", *COLUMNS], by_family)
        + "\nObjectives, each trained for two steps on Stable Diffusion:\n\n"
        + table(["objective", *MODES], by_objective)
    )


MODES = ("copies", "adapters")

if __name__ == "__main__":
    PAGE.write_text(page(results()), encoding="utf-8")
