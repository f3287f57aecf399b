"""Tables of scores, for the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fewstep.eval.report.ranking import best_of, direction_of
from fewstep.eval.score_files import Score

CONTENTS = {"reference_sha256": "reference", "captions_sha256": "captions", "features_sha256": "network weights"}


def best_teacher(scores: Sequence[Score]) -> list[Score]:
    """The students' scores, and those of the teachers' settings that are best within a budget of 1, 2, 4, 8, … NFE.

    The first metric decides; if its direction is unknown, all scores are returned. NFE are rounded up to a budget.
    """
    direction = direction_of(scores[0]) if scores else None
    if direction is None:
        return list(scores)
    by_budget: dict[tuple[str, str, int], list[Score]] = {}
    for score in scores:
        if score.role == "teacher" and score.metric == scores[0].metric:
            by_budget.setdefault((score.model, score.reference, (score.nfe - 1).bit_length()), []).append(score)
    chosen = {_setting(best_of(group, direction)) for group in by_budget.values()}
    return [score for score in scores if score.role == "student" or _setting(score) in chosen]


def rows(scores: Sequence[Score]) -> list[list[str]]:
    """A header, then one row per setting: the value, or mean ± standard deviation over seeds.

    Teachers come first; models keep their order, and the rows of a model are sorted by NFE. Where scores are against
    several references, these follow the models' names.
    """
    several = len({score.reference for score in scores}) > 1
    names = list(dict.fromkeys(score.metric for score in scores))
    table = [["model", "solver", "guidance", "NFE", *names, "n", "seeds", "seconds"]]
    models = list(dict.fromkeys(score.model for score in scores))
    settings = dict.fromkeys(_setting(score) for score in scores)
    for setting in sorted(settings, key=lambda s: (s[0] == "student", models.index(s[1]), s[6])):
        own = [score for score in scores if _setting(score) == setting]
        _, model, solver, n, guidance, _, nfe, _ = setting
        model = label_of(own[0], scores) + (f" against {own[0].reference}" if several and own[0].reference else "")
        seeds = {score.seed: score.seconds for score in own}
        cells = [_cell([score for score in own if score.metric == name]) for name in names]
        end = [f"{n:,}", " ".join(map(str, sorted(seeds))), f"{statistics.fmean(seeds.values()):.0f}"]
        table.append([model, solver, f"{guidance:g}", str(nfe), *cells, *end])
    return table


def side_by_side(ours: Sequence[Score], theirs: Sequence[Score]) -> list[list[str]]:
    """A header, then one row per metric and setting that both files contain, with the difference and, if the values are
    not comparable, the reason. A file of a single setting is compared with every setting of the other. Teachers, whose
    scores a run's file takes over, count only if a file contains nothing else."""
    table = [["ours", "theirs", "metric", "our value", "their value", "difference", "comparable"]]
    ours, theirs = ([score for score in file if score.role != "teacher"] or file for file in (ours, theirs))
    for a in _groups(ours):
        for b in _groups(theirs):
            single = len(_groups(ours)) == 1 or len(_groups(theirs)) == 1
            if not single and _setting(a[0])[2:7] != _setting(b[0])[2:7]:
                continue
            for metric in dict.fromkeys(score.metric for score in a):
                left, right = ([score for score in group if score.metric == metric] for group in (a, b))
                if right:
                    means = [statistics.fmean(score.value for score in part) for part in (left, right)]
                    values = [_cell(part) for part in (left, right)]
                    titles = [_title(a[0]), _title(b[0]), metric]
                    comparable = _comparable(left[0], right[0])
                    table.append([*titles, *values, f"{means[0] - means[1]:+.3f}", comparable])
    return table


def _groups(scores: Sequence[Score]) -> list[list[Score]]:
    """The scores by setting, over all seeds."""
    settings = dict.fromkeys(map(_setting, scores))
    return [[score for score in scores if _setting(score) == setting] for setting in settings]


def _title(score: Score) -> str:
    guided = f", guidance {score.guidance:g}" if score.guidance != 1 else ""
    return f"{score.model}, {score.sampler}, {score.nfe} NFE{guided}" if score.nfe else score.model


def _comparable(a: Score, b: Score) -> str:
    """ "yes"; "no" with what differs; or "unknown" with what a score of an earlier version does not record. Contents
    decide, not paths."""
    different, unknown = (["n"] if a.n != b.n else []), list[str]()
    for field, what in CONTENTS.items():
        ours, theirs = getattr(a, field), getattr(b, field)
        if field == "captions_sha256" and None in (ours, theirs):
            continue  # images on disk, and a metric without captions
        if ours != theirs and None not in (ours, theirs):
            different.append(what)
        elif None in (ours, theirs) and (a.reference or b.reference):
            (different if a.reference != b.reference else unknown).append(what)
    left, right = _settings_of(a), _settings_of(b)
    different += [name for name in (*left, *right) if left.get(name) != right.get(name) and name not in different]
    if different:
        return f"no: different {', '.join(different)}"
    return f"unknown: contents of {', '.join(unknown)} are not recorded" if unknown else "yes"


def _settings_of(score: Score) -> dict[str, object]:
    """The features and the preparation of images that a value depends on, as far as they are recorded."""
    manifest = score.manifest or {}
    protocol = manifest.get("protocol", {})
    found = {name: protocol[name] for name in ("size", "filter", "frames") if name in protocol}
    if found.get("size") is None:
        found.pop("filter", None)
    features = manifest.get("features", {}).get(score.metric)
    return found | ({"features": features} if features else {})


def markdown(scores: Sequence[Score]) -> str:
    """``rows`` as a Markdown table."""
    head, *body = rows(scores)
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *body])


def label_of(score: Score, scores: Sequence[Score]) -> str:
    """The model's name, with what tells it from others of that name in ``scores``: its path, or the hash of its
    contents."""
    same = {(s.source, s.source_sha256) for s in scores if (s.role, s.model) == (score.role, score.model)}
    if len(same) < 2:
        return score.model
    if len({source for source, _ in same}) == len(same) and score.source:
        return f"{score.model} ({score.source})"
    return f"{score.model} ({(score.source_sha256 or '')[:12] or 'contents not recorded'})"


def _setting(score: Score) -> tuple[str, str, str, int, float, int, int, tuple[str | None, ...]]:
    source = (score.source, score.source_sha256, score.protocol, score.protocol_sha256, score.reference)
    return score.role, score.model, score.sampler, score.n, score.guidance, score.steps, score.nfe, source


def _cell(scores: Sequence[Score]) -> str:
    """The mean ± the standard deviation over seeds, or one value with its own error in brackets."""
    if not scores:
        return ""
    values = [score.value for score in scores]
    if len(values) > 1:
        return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    error = f" (± {scores[0].error:.3f})" if scores[0].error is not None else ""
    return f"{values[0]:.3f}{error}"
