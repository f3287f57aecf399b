"""Tables and numbers of the documentation, generated from committed result files.

A table stands between ``<!-- KIND: FILE ... -->`` and ``<!-- end -->``, with one of these kinds:

    best scores        scores of the files: all of the students', and the teacher's best within each budget of NFE;
                       runs of one name are seeds of the training
    relative scores    FILE ... / BASELINE: every student at its best number of evaluations by the first metric, beside
                       the best of the baseline's teacher, overall and within the students' evaluations
    solver comparison  a ``solvers.json``: every solver on its best grid
    win rates          LABEL=FILE ... of ``fewstep winrate --json``: mean ± deviation over a label's files, and the
                       lowest end of the 95 % intervals
    findings           LABEL=FILE ... of ``metrics.jsonl``: what the diagnosis finds in each, and at which step first
    metrics            "all": what each built-in metric declares
    records            FILE [KEY]: a list of records, or records by name, or lists of them by name (mean ± deviation)

A number stands between ``<!-- value: [REDUCTION] FILE [FIELD=VALUE ...] KEY [/ ...] [: FORMAT] -->`` and
``<!-- /value -->``. FIELD=VALUE selects entries of a list, KEY is a dotted path, ``/`` divides by a second number, and
FORMAT is Python's (default ``.3f``). Without a reduction exactly one entry must be left. The folder of a reference has
the key ``training_images``: the distance of its training images from its test images.

Files are relative to the page. ``python -m fewstep.eval.report.doc_blocks PAGE ...`` rewrites pages; a test compares.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.metrics.registry import BUILTIN
from fewstep.eval.references import load_reference
from fewstep.eval.report.diagnosis import diagnose
from fewstep.eval.report.tables import best_teacher, rows
from fewstep.eval.score_files import Score, merge, read_scores
from fewstep.eval.solver_comparison import best_grids, geometric_mean, read_results, table_rows

TABLE = re.compile(r"(<!-- (?P<kind>[a-z ]+): (?P<files>[^>\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- value: (?P<query>.+?) -->).*?(<!-- /value -->)", re.DOTALL)

REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean, "stdev": statistics.stdev, "geomean": geometric_mean, "min": min, "max": max,
    "last": lambda values: values[-1],
}  # fmt: skip


def refresh(text: str, folder: Path) -> str:
    """The text of a page with every table and number recomputed from the files that it names, relative to ``folder``.

    Raises ``ValueError`` on a block that cannot be computed.
    """

    def table(match: re.Match[str]) -> str:
        if match["kind"] not in TABLES:
            raise ValueError(f"unknown kind of table {match['kind']!r}; known: {', '.join(TABLES)}")
        head, *body = TABLES[match["kind"]](shlex.split(match["files"]), folder)
        lines = [f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body)]
        return f"{match[1]}{''.join(lines)}{match[4]}"

    def number(match: re.Match[str]) -> str:
        return f"{match[1]}{value(match['query'], folder)}{match[3]}"

    return VALUE.sub(number, TABLE.sub(table, text))


# --- numbers ----------------------------------------------------------------------------------------------------------


def value(query: str, folder: Path) -> str:
    """The formatted number of a value block."""
    tokens = shlex.split(query)
    spec = ".3f"
    if ":" in tokens:
        tokens, spec = tokens[: tokens.index(":")], tokens[-1]
    try:
        if "/" not in tokens:
            return format(_number(tokens, folder), spec)
        cut = tokens.index("/")
        return format(_number(tokens[:cut], folder) / _number(tokens[cut + 1 :], folder), spec)
    except (LookupError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"the block 'value: {query}' cannot be computed: {error}") from error


def _number(tokens: Sequence[str], folder: Path) -> float:
    reduction = REDUCTIONS.get(tokens[0])
    file, *conditions, key = tokens[1:] if reduction else tokens
    wanted = dict(condition.split("=", 1) for condition in conditions)
    content = _read(folder / file)
    entries = content if isinstance(content, list) else [content]
    chosen = [entry for entry in entries if all(_text(entry.get(name)) == text for name, text in wanted.items())]
    values = [found for entry in chosen if (found := _lookup(entry, key)) is not None]
    if reduction is None and len(values) != 1:
        raise ValueError(f"{len(values)} entries have {key}; name a reduction or more conditions")
    return reduction(values) if reduction else values[0]


def _read(file: Path) -> Any:
    if file.is_dir():
        train, test = (load_reference(str(file), split).statistics for split in ("train", "test"))
        return {"training_images": frechet_distance(train, test)}
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)


def _lookup(node: Any, path: str) -> Any:
    """What a dotted path leads to, None if nothing; keys may contain dots themselves."""
    if not path:
        return node
    if isinstance(node, list):
        first, _, rest = path.partition(".")
        return _lookup(node[int(first)], rest)
    names = (name for name in node if f"{path}.".startswith(f"{name}."))
    return next((_lookup(node[name], path[len(name) + 1 :]) for name in names), None)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- tables -----------------------------------------------------------------------------------------------------------


def _best_scores(files: Sequence[str], folder: Path) -> list[list[str]]:
    scores: list[Score] = []
    for file in files:
        scores = merge(scores, read_scores(folder / file))
    named = [score.model_copy(update={"source": None, "source_sha256": None}) for score in scores]
    if len({score.identity for score in named}) < len(named):
        raise ValueError(f"two runs of one name and seed in {', '.join(files)}: give them names with --name")
    return rows(best_teacher(named))


def _relative_scores(arguments: Sequence[str], folder: Path) -> list[list[str]]:
    *files, _, baseline = arguments
    scores = [score for file in files for score in read_scores(folder / file) if score.role == "student"]
    metric, n = scores[0].metric, scores[0].n
    by_setting: dict[tuple[str, int], list[Score]] = {}
    for score in scores:
        if score.metric == metric:
            by_setting.setdefault((score.model, score.nfe), []).append(score)
    mean = {setting: statistics.fmean(score.value for score in some) for setting, some in by_setting.items()}
    chosen = [
        min((s for s in mean if s[0] == model), key=mean.__getitem__) for model in dict.fromkeys(s[0] for s in mean)
    ]
    teachers = [s for s in read_scores(folder / baseline) if (s.role, s.metric, s.n) == ("teacher", metric, n)]
    best = min(teachers, key=lambda score: score.value)
    few = min((s for s in teachers if s.nfe <= max(nfe for _, nfe in chosen)), key=lambda score: score.value)
    table = [["model", "solver", "guidance", "NFE", metric, "times the teacher's best", "seeds below it"]]
    for group in ([few], [best], *(by_setting[setting] for setting in chosen)):
        one, values = group[0], [score.value for score in group]
        below = f"{sum(value < best.value for value in values)} of {len(values)}" if one.role == "student" else ""
        shown = _spread(values) if len(values) > 1 else f"{values[0]:.3f}"
        ratio = statistics.fmean(values) / best.value
        table.append([one.model, one.sampler, f"{one.guidance:g}", str(one.nfe), shown, f"{ratio:.2f}", below])
    return table


def _solver_comparison(files: Sequence[str], folder: Path) -> list[list[str]]:
    return table_rows(best_grids([line for file in files for line in read_results(folder / file)]))


def _win_rates(files: Sequence[str], folder: Path) -> list[list[str]]:
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for text in files:
        label, file = text.split("=", 1)
        by_label.setdefault(label, []).extend(_read(folder / file))
    rewards = list(dict.fromkeys(row["reward"] for results in by_label.values() for row in results))
    table = [["", *rewards]]
    for label, results in by_label.items():
        found = [[row for row in results if row["reward"] == reward] for reward in rewards]
        shown = [f"{_spread([r['win_rate'] for r in some])} ({min(r['low'] for r in some):.3f})" for some in found]
        table.append([label, *shown])
    return table


def _findings(files: Sequence[str], folder: Path) -> list[list[str]]:
    table = [["run", "step", "finding"]]
    for label, file in (text.split("=", 1) for text in files):
        logged = [entry for entry in _read(folder / file) if "validation" not in entry]
        first: dict[str, list[str]] = {}
        for n, entry in enumerate(logged, start=1):
            for finding in diagnose(logged[:n]):
                first.setdefault(finding.name, [f"`{label}`", str(entry["step"]), finding.text])
        table += first.values() or [[f"`{label}`", "", "nothing"]]
    return table


def _records(arguments: Sequence[str], folder: Path) -> list[list[str]]:
    content = _lookup(_read(folder / arguments[0]), arguments[1] if len(arguments) > 1 else "")
    named = content.items() if isinstance(content, dict) else [(None, record) for record in content]
    first = next(record[0] if isinstance(record, list) else record for _, record in named)
    steps = {key: list(dict.fromkeys(step for _, record in named for step in record[key]))
             for key in first if isinstance(first[key], dict)}  # fmt: skip
    table = [[*([""] if isinstance(content, dict) else []), *(_title(key, steps.get(key, ())) for key in first)]]
    for name, record in named:
        if isinstance(record, list):
            shown = [_spread([one[key] for one in record]) for key in first]
        else:
            shown = [_cell(record[key], steps.get(key, ())) for key in first]
        table.append([*([f"`{name}`"] if name else []), *shown])
    return table


def _metrics(_: Sequence[str], folder: Path) -> list[list[str]]:
    table = [["metric", "better", "network", "computation", "least n", "needs", "error bar"]]
    for metric in BUILTIN:
        least = f"{metric.minimum_n} per class or caption" if metric.per_condition else str(metric.minimum_n)
        needs = {
            "reference": metric.needs_reference and not metric.needs_real_features,
            "features of every real image": metric.needs_real_features,
            "captions": metric.caption_prefix is not None,
            "classes or captions": metric.per_condition,
            "videos": metric.videos,
            f"images of {metric.minimum_side} pixels or more": metric.minimum_side > 1,
        }
        listed = ", ".join(name for name, needed in needs.items() if needed)
        cells = [f"`{metric.name}`", metric.direction, f"`{metric.network}`", metric.computation, least, listed]
        table.append([*cells, metric.error_of or ""])
    return table


def _title(key: str, steps: Sequence[str]) -> str:
    return f"{key.replace('_', ' ')} at {', '.join(steps)}" if steps else key.replace("_", " ")


def _cell(value: Any, steps: Sequence[str]) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{value[step]:.3f}" if step in value else "–" for step in steps)
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


TABLES: dict[str, Callable[[Sequence[str], Path], list[list[str]]]] = {
    "best scores": _best_scores, "relative scores": _relative_scores, "solver comparison": _solver_comparison,
    "win rates": _win_rates, "findings": _findings, "records": _records, "metrics": _metrics,
}  # fmt: skip


def main(pages: Sequence[str]) -> None:
    """Rewrites pages in place."""
    for name in pages:
        page = Path(name)
        page.write_text(refresh(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
