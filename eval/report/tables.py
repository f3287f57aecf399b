"""Tables of scores: rows for the terminal, and Markdown in the documentation made from committed result files.

A block ``<!-- best scores: FILE ... -->`` … ``<!-- end -->`` holds the table of those files' scores, of the teachers'
only the best. ``python -m fewstep.eval.tables README.md`` writes the blocks anew; a test checks that they agree.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from fewstep.eval.score_files import Score, merge, read_scores

BLOCK = re.compile(r"(<!-- best scores: (?P<files>[^>]*?) -->\n)(?P<table>.*?)(<!-- end -->)", re.DOTALL)
FREE = ("name", "metrics", "seeds", "reference", "n")  # of a protocol's settings: not how an image becomes a number


def best_teacher(scores: Sequence[Score]) -> list[Score]:
    """The students' scores, and of the teachers' only the settings that are best within a budget of 1, 2, 4, 8, … NFE.

    Best is the lowest of the first metric; a setting costs up to the next power of two.
    """
    tops: dict[tuple[str, int], Score] = {}
    for score in scores:
        if score.role == "teacher" and score.metric == scores[0].metric:
            budget = (score.model, (score.nfe - 1).bit_length())
            if budget not in tops or score.value < tops[budget].value:
                tops[budget] = score
    chosen = {_setting(score) for score in tops.values()}
    return [score for score in scores if score.role == "student" or _setting(score) in chosen]


def rows(scores: Sequence[Score]) -> list[list[str]]:
    """The header, then a row a setting: the value, or mean ± standard deviation over several seeds.

    Teachers come first; models are in the order in which they come, a model's rows in that of NFE.
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
    """A header, then a row a metric and setting that both files have (a file of one setting is compared with whatever
    the other has), with the difference and, where the values are not comparable, what differs. Teachers, whose scores a
    run's file takes over, count only where a file has nothing else."""
    table = [["ours", "theirs", "metric", "ours", "theirs", "difference", "comparable"]]
    ours, theirs = ([score for score in file if score.role != "teacher"] or file for file in (ours, theirs))
    for a in _groups(ours):
        for b in _groups(theirs):
            alone = len(_groups(ours)) == 1 or len(_groups(theirs)) == 1
            if not alone and _setting(a[0])[2:] != _setting(b[0])[2:]:
                continue
            for metric in dict.fromkeys(score.metric for score in a):
                left, right = ([score for score in group if score.metric == metric] for group in (a, b))
                if right:
                    means = [statistics.fmean(score.value for score in part) for part in (left, right)]
                    values = [_cell([score.value for score in part]) for part in (left, right)]
                    same = _differing(left[0], right[0])
                    title = [_title(a[0]), _title(b[0]), metric]
                    table.append([*title, *values, f"{means[0] - means[1]:+.3f}", same])
    return table


def _groups(scores: Sequence[Score]) -> list[list[Score]]:
    """The scores by setting, all seeds of one together."""
    return [[score for score in scores if _setting(score) == own] for own in dict.fromkeys(map(_setting, scores))]


def _title(score: Score) -> str:
    guided = f", guidance {score.guidance:g}" if score.guidance != 1 else ""
    return f"{score.model}, {score.solver}, {score.nfe} NFE{guided}" if score.nfe else score.model


def _differing(a: Score, b: Score) -> str:
    """ "yes", or in what the two are not of one protocol."""
    names = ("reference", "n", "features_sha256")
    wrong = [name for name in names if getattr(a, name) != getattr(b, name)]
    ours, theirs = ((score.manifest or {}).get("protocol", {}) for score in (a, b))
    wrong += [name for name in (*ours, *theirs) if name not in FREE and ours.get(name) != theirs.get(name)]
    return f"no: other {', '.join(dict.fromkeys(wrong))}" if wrong else "yes"


def markdown(scores: Sequence[Score]) -> str:
    """``rows`` as a Markdown table."""
    head, *body = rows(scores)
    return "".join("| " + " | ".join(row) + " |\n" for row in [head, ["---"] * len(head), *body])


def refreshed(text: str, root: Path) -> str:
    """The text with every block's table made anew from the files it names (relative to ``root``)."""

    def block(match: re.Match[str]) -> str:
        scores: list[Score] = []
        for file in match["files"].split():
            scores = merge(scores, read_scores(root / file))
        return f"{match[1]}{markdown(best_teacher(scores))}{match[4]}"

    return BLOCK.sub(block, text)


def _setting(score: Score) -> tuple[str, str, str, int, float, int, int]:
    return score.role, score.model, score.solver, score.n, score.guidance, score.steps, score.nfe


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(refreshed(page.read_text(encoding="utf-8"), page.parent), encoding="utf-8")
