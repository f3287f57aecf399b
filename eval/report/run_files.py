"""What the report reads from a run folder: logged metrics and scores, with remarks on what is damaged or missing."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fewstep.eval.metrics.metric import Direction
from fewstep.eval.report.ranking import direction_of
from fewstep.eval.report.tables import label_of
from fewstep.eval.score_files import SCORES, Score

Entry = dict[str, float]
ENTRY = TypeAdapter(Entry)
Setting = tuple[str, str, str, int, int, int, float]


class Result(Score):
    """A score, or the mean of several that differ only in their seed. ``model`` tells models of one name apart.
    ``column`` is its column in the report's table: the metric, with the number of its ``origin`` if there are several:
    the reference, the features and the protocol that its values depend on."""

    column: str
    origin: str
    direction: Direction | None
    seeds: tuple[int, ...]
    spread: float | None

    @property
    def setting(self) -> Setting:
        """Its row of the table; rows are sorted by it."""
        return setting_of(self)


def read_text(file: Path) -> str:
    """The content of a text file; empty if it does not exist."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def read_metrics(file: Path, remarks: list[str]) -> tuple[list[Entry], list[Entry]]:
    """The logged steps and the validations of ``metrics.jsonl``, sorted by step. Appends remarks on unusable lines and
    values."""
    logged: dict[float, Entry] = {}
    validations: dict[float, Entry] = {}
    damaged = not_finite = 0
    for line in filter(str.strip, read_text(file).splitlines()):
        try:
            entry = ENTRY.validate_json(line)
            finite = {name: value for name, value in entry.items() if math.isfinite(value)}
            step, _ = finite["step"], finite["seconds"]
        except (ValidationError, KeyError):
            damaged += 1
            continue
        not_finite += len(entry) - len(finite)
        entries = validations if "validation" in entry else logged
        entries[step] = finite  # a resumed run repeats steps: the last entry counts
    if damaged:
        remarks.append(f"metrics.jsonl: {damaged} damaged line{'s'[: damaged - 1]} skipped.")
    if not_finite:
        remarks.append(f"metrics.jsonl: {not_finite} value{'s'[: not_finite - 1]} not finite, omitted from the curves.")
    if not logged:
        remarks.append("No training steps are logged, so there are no curves.")
    return [logged[step] for step in sorted(logged)], [validations[step] for step in sorted(validations)]


def read_results(file: Path, remarks: list[str]) -> list[Result]:
    """The scores of ``eval.json``, averaged over seeds, in the order of the table. Appends remarks on unusable ones."""
    scores: list[Score] = []
    try:
        scores = SCORES.validate_json(read_text(file) or "[]")
    except ValidationError:
        remarks.append("eval.json is damaged; fewstep eval writes a new one.")
    if not_finite := sum(not math.isfinite(score.value) for score in scores):
        remarks.append(f"eval.json: {not_finite} value{'s'[: not_finite - 1]} not finite, omitted.")
    scores = [score for score in scores if math.isfinite(score.value)]
    scores = [score.model_copy(update={"model": label_of(score, scores)}) for score in scores]
    if not scores:
        remarks.append("There are no scores; fewstep eval writes them to eval.json.")
    origins = _origins(scores)
    numbers = {origin: number for number, origin in enumerate(dict.fromkeys(origins), start=1)}
    several = Counter(metric for metric, _ in {(s.metric, o) for s, o in zip(scores, origins, strict=True)})
    groups: dict[tuple[Setting, str], list[Score]] = {}
    origin_of: dict[str, str] = {}
    for score, origin in zip(scores, origins, strict=True):  # a metric with two references has two columns
        column = f"{score.metric} [{numbers[origin]}]" if several[score.metric] > 1 else score.metric
        origin_of[column] = origin
        groups.setdefault((setting_of(score), column), []).append(score)
    directions: dict[str, Direction | None] = {}
    for score in scores:
        if score.metric not in directions:
            directions[score.metric] = direction_of(score)
    results = [
        _mean(group, column, origin_of[column], directions[group[0].metric]) for (_, column), group in groups.items()
    ]
    return sorted(results, key=setting_of)


def setting_of(score: Score) -> Setting:
    """What determines the row of a score in the table."""
    return score.role, score.model, score.sampler, score.n, score.nfe, score.steps, score.guidance


def _origins(scores: Sequence[Score]) -> list[str]:
    """What the values depend on, of each score. Hashes are named only where two are known for one name, so that scores
    of earlier versions, which have none, share a column with new ones."""
    names = [(score.reference, score.features_sha256) for score in scores]
    hashes = [(score.reference_sha256, score.protocol_sha256, score.captions_sha256) for score in scores]
    known: dict[tuple[str, ...], set[tuple[str | None, ...]]] = {}
    for score, name, contents in zip(scores, names, hashes, strict=True):
        if any(contents):
            known.setdefault((score.metric, *name), set()).add(contents)
    origins = []
    for score, name, contents in zip(scores, names, hashes, strict=True):
        of_contents = ""
        if len(known.get((score.metric, *name), ())) > 1:
            of_contents = f", contents {', '.join(digest[:12] for digest in contents if digest) or 'not recorded'}"
        origins.append(f"{score.reference}, features {score.features_sha256[:12]}{of_contents}")
    return origins


def _mean(group: Sequence[Score], column: str, origin: str, direction: Direction | None) -> Result:
    group = list({score.seed: score for score in group}.values())  # of several equal evaluations, the last counts
    values = [score.value for score in group]
    changes = {
        "value": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "error": group[0].error if len(values) == 1 else None,
        "seconds": statistics.fmean(score.seconds for score in group),
        "seeds": tuple(sorted(score.seed for score in group)),
    }
    return Result(**(group[0].model_dump() | changes), column=column, origin=origin, direction=direction)
