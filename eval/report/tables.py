"""Tables of scores, for the terminal and as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fewstep.eval.report.ranking import best_of, direction_of
from fewstep.eval.score_files import Score

IRRELEVANT = ("name", "metrics", "seeds", "reference", "n")  # a protocol's settings that do not affect image features


def best_teacher(scores: Sequence[Score]) -> list[Score]:
    """The students' scores, and those of the teachers' settings that are best within a budget of 1, 2, 4, 8, … NFE.

    The first metric decides; if its direction is unknown, all scores are returned. NFE are rounded up to a budget.
    """
    direction = direction_of(scores[0]) if scores else None
    if direction is None:
        return list(scores)
    by_budget: dict[tuple[str, int], list[Score]] = {}
    for score in scores:
        if score.role == "teacher" and score.metric == scores[0].metric:
            by_budget.setdefault((score.model, (score.nfe - 1).bit_length()), []).append(score)
    chosen = {_setting(best_of(group, direction)) for group in by_budget.values()}
    return [score for score in scores if score.role == "student" or _setting(score) in chosen]


def rows(scores: Sequence[Score]) -> list[list[str]]:
    """A header, then one row per setting: the value, or mean ± standard deviation over seeds.

    Teachers come first; models keep their order, and the rows of a model are sorted by NFE.
    """
    names = list(dict.fromkeys(score.metric for score in scores))
    table = [["model", "solver", "guidance", "NFE", *names, "n", "seeds", "seconds"]]
    models = list(dict.fromkeys(score.model for score in scores))
    settings = dict.fromkeys(_setting(score) for score in scores)
    for setting in sorted(settings, key=lambda s: (s[0] == "student", models.index(s[1]), s[-1])):
        own = [score for score in scores if _setting(score) == setting]
        _, model, solver, n, guidance, _, nfe = setting
        seeds = {score.seed: score.seconds for score in own}
        cells = [_cell([score.value for score in own if score.metric == name]) for name in names]
        end = [f"{n:,}", " ".join(map(str, sorted(seeds))), f"{statistics.fmean(seeds.values()):.0f}"]
        table.append([model, solver, f"{guidance:g}", str(nfe), *cells, *end])
    return table


def side_by_side(ours: Sequence[Score], theirs: Sequence[Score]) -> list[list[str]]:
    """A header, then one row per metric and setting that both files contain, with the difference and, if the values are
    not comparable, the reason. A file of a single setting is compared with every setting of the other. Teachers, whose
    scores a run's file takes over, count only if a file contains nothing else."""
    table = [["ours", "theirs", "metric", "ours", "theirs", "difference", "comparable"]]
    ours, theirs = ([score for score in file if score.role != "teacher"] or file for file in (ours, theirs))
    for a in _groups(ours):
        for b in _groups(theirs):
            single = len(_groups(ours)) == 1 or len(_groups(theirs)) == 1
            if not single and _setting(a[0])[2:] != _setting(b[0])[2:]:
                continue
            for metric in dict.fromkeys(score.metric for score in a):
                left, right = ([score for score in group if score.metric == metric] for group in (a, b))
                if right:
                    means = [statistics.fmean(score.value for score in part) for part in (left, right)]
                    values = [_cell([score.value for score in part]) for part in (left, right)]
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
    return f"{score.model}, {score.solver}, {score.nfe} NFE{guided}" if score.nfe else score.model


def _comparable(a: Score, b: Score) -> str:
    """ "yes", or the properties in which the two differ."""
    names = ("reference", "n", "features_sha256")
    different = [name for name in names if getattr(a, name) != getattr(b, name)]
    ours, theirs = ((score.manifest or {}).get("protocol", {}) for score in (a, b))
    different += [name for name in (*ours, *theirs) if name not in IRRELEVANT and ours.get(name) != theirs.get(name)]
    return f"no: different {', '.join(dict.fromkeys(different))}" if different else "yes"


def markdown(scores: Sequence[Score]) -> str:
    """``rows`` as a Markdown table."""
    head, *body = rows(scores)
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *body])


def _setting(score: Score) -> tuple[str, str, str, int, float, int, int]:
    return score.role, score.model, score.solver, score.n, score.guidance, score.steps, score.nfe


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"
