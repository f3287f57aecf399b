"""Two evaluations at once that write to one file of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from worlds import tiny_teacher

from fewstep.api import evaluate
from fewstep.eval.protocol import Protocol
from fewstep.eval.score_files import Score, read_scores, write_scores


def score(**changes: Any) -> Score:
    known = {
        "model": "m", "role": "teacher", "solver": "euler", "nfe": 1, "steps": 1, "guidance": 1.0, "metric": "fd",
        "value": 1.0, "n": 10, "seed": 0, "seconds": 0.0, "reference": "r", "features_sha256": "f",
    }  # fmt: skip
    return Score(**known | changes)


class Evaluator:
    """While it computes, another process writes its own scores to the file."""

    def __init__(self, file: Path) -> None:
        self.file, self.seeds, self.hashes = file, (0,), {"f"}

    def check(self, model: object) -> None: ...

    def __call__(self, *arguments: object) -> list[Score]:
        write_scores([score(metric="kid")], self.file)
        return [score()]

    def of_images(self, *arguments: object) -> list[Score]:
        return self()


@pytest.mark.parametrize("images", [False, True])
def test_what_another_evaluation_wrote_meanwhile_is_kept(
    images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "eval.json"
    write_scores([score(metric="old")], file)
    monkeypatch.setattr(evaluate, "_evaluator", lambda *arguments: Evaluator(file))
    protocol = Protocol(name="a", reference="real", metrics=("fid",), n=10)
    if images:
        evaluate.evaluate_images(tmp_path, protocol, json_file=file, device="cpu")
    else:
        evaluate.evaluate(tiny_teacher(tmp_path), protocol=protocol, steps=[1], json_file=file, device="cpu")
    assert {each.metric for each in read_scores(file)} == {"fd", "kid"}
