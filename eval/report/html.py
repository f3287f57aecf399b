"""The report of a run: one self-contained HTML page, made from what lies in the run folder and from nothing else."""

from __future__ import annotations

import base64
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import yaml
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.eval.report.charts import Chart, Line, chart
from fewstep.eval.report.diagnosis import diagnose
from fewstep.eval.score_files import Score

LOWER_IS_BETTER = ("fd", "fid", "kid", "cmmd")
HIGHER_IS_BETTER = ("precision", "recall", "accuracy", "diversity", "density", "coverage", "clip")
MOST_SAMPLES = 8
SPENT = ("step", "seconds", "evaluations")
Entry = dict[str, float]
ENTRY = TypeAdapter(Entry)
Setting = tuple[str, str, str, int, int, int, float]


class Result(Score):
    """A score, or the mean of several that differ in nothing but their seed."""

    seeds: tuple[int, ...] = ()
    spread: float | None = None

    @property
    def setting(self) -> Setting:
        """The row of the table; rows are ordered by it."""
        return self.role, self.model, self.solver, self.n, self.nfe, self.steps, self.guidance

    @property
    def origin(self) -> str:
        return f"{self.reference}, features {self.features_sha256[:12]}"


class Picture(NamedTuple):
    caption: str
    data: str
    width: int
    height: int


def write_report(run: str | Path) -> Path:
    """Writes ``report.html`` into a run folder and returns its path. The same folder always gives the same bytes.

    Raises ``UserError`` if the folder is no run (it has no ``config.yaml``) or if it cannot be written.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml.")
    remarks: list[str] = []
    logged, validations = read_metrics(run / "metrics.jsonl", remarks)
    scores = read_scores(run / "eval.json", remarks)
    config, environment = _text(run / "config.yaml"), _text(run / "environment.json")
    page = _template().render(
        name=run.resolve().name,
        facts=facts(config, environment),
        summary=[*training_summary(logged, validations), *verdict(scores)],
        comparison=_picture(run / "samples" / "comparison.png", "Teacher and student from the same noise", remarks),
        diversity=_optional(run / "samples" / "diversity.png", "Several noises for one condition", remarks),
        video=_video(run / "samples" / "comparison.mp4"),
        metrics={score.metric: {1: "↓", -1: "↑", 0: ""}[direction(score.metric)] for score in scores},
        origins={score.metric: score.origin for score in scores},
        table=table(scores),
        quality=quality_curves(scores),
        validation=[
            _curve("validation", validations, axis, look="o-")
            for axis in SPENT
            if validations and axis in validations[0]
        ],
        training=training_curves(logged),
        health=health(logged),
        samples=_samples(run / "samples", remarks),
        config=config,
        manifest=manifest(scores),
        environment=environment,
        remarks=remarks,
    )
    write_text(page, run / "report.html")
    return run / "report.html"


def read_metrics(file: Path, remarks: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Logged steps and validations in order of steps; appends remarks on lines and values that cannot be used."""
    logged: dict[float, Entry] = {}
    validations: dict[float, Entry] = {}
    damaged = lost = 0
    for line in filter(str.strip, _text(file).splitlines()):
        try:
            entry = ENTRY.validate_json(line)
            finite = {name: value for name, value in entry.items() if math.isfinite(value)}
            step, _ = finite["step"], finite["seconds"]
        except (ValidationError, KeyError):
            damaged += 1
            continue
        lost += len(entry) - len(finite)
        kept = validations if "validation" in entry else logged
        kept[step] = finite  # a resumed run repeats steps: the last word counts
    if damaged:
        remarks.append(f"metrics.jsonl: {damaged} damaged line{'s'[: damaged - 1]} skipped.")
    if lost:
        remarks.append(f"metrics.jsonl: {lost} value{'s'[: lost - 1]} not finite, left out of the curves.")
    if not logged:
        remarks.append("No training steps are logged, so there are no curves.")
    return [logged[step] for step in sorted(logged)], [validations[step] for step in sorted(validations)]


def read_scores(file: Path, remarks: list[str]) -> list[Result]:
    """The scores of ``eval.json`` in the table's order; appends remarks on what cannot be used."""
    found: list[Result] = []
    try:
        found = TypeAdapter(list[Result]).validate_json(_text(file) or "[]")
    except ValidationError:
        remarks.append("eval.json is damaged; fewstep eval writes it anew.")
    if lost := sum(not math.isfinite(result.value) for result in found):
        remarks.append(f"eval.json: {lost} value{'s'[: lost - 1]} not finite, left out.")
    found = [result for result in found if math.isfinite(result.value)]
    if not found:
        remarks.append("There are no scores; fewstep eval writes them to eval.json.")
    origins = {(result.metric, result.origin) for result in found}
    twice = {metric for metric, count in Counter(metric for metric, _ in origins).items() if count > 1}
    seeds: dict[tuple[Setting, str], list[Result]] = {}
    for result in found:  # a metric of two references is two columns
        metric = f"{result.metric} ({result.origin})" if result.metric in twice else result.metric
        seeds.setdefault((result.setting, metric), []).append(result)
    results = [_mean(group).model_copy(update={"metric": metric}) for (_, metric), group in seeds.items()]
    return sorted(results, key=lambda result: result.setting)


def _mean(group: Sequence[Result]) -> Result:
    values = [result.value for result in group]
    changes = {
        "value": statistics.fmean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "seconds": statistics.fmean(result.seconds for result in group),
        "seeds": tuple(sorted(result.seed for result in group)),
    }
    return group[0].model_copy(update=changes)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _picture(file: Path, caption: str, remarks: list[str]) -> Picture | None:
    try:
        with Image.open(file) as image:
            image.load()
            return Picture(caption, base64.b64encode(file.read_bytes()).decode(), *image.size)
    except OSError:
        remarks.append(f"There is no {'readable ' * file.exists()}picture samples/{file.name}.")
        return None


def _optional(file: Path, caption: str, remarks: list[str]) -> Picture | None:
    return _picture(file, caption, remarks) if file.exists() else None


def _video(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode() if file.is_file() else ""


def _samples(folder: Path, remarks: list[str]) -> list[Picture]:
    """Some of the validation pictures, evenly spread, the first and the last among them."""
    files = sorted(folder.glob("step-*.png"))
    chosen = sorted({round(i) for i in np.linspace(0, len(files) - 1, MOST_SAMPLES)}) if files else []
    if not files:
        remarks.append("No sample pictures were made during training.")
    if len(chosen) < len(files):
        remarks.append(f"{len(chosen)} of {len(files)} sample pictures are shown; all are in samples/.")
    steps = [(files[i], files[i].stem.removeprefix("step-").lstrip("0") or "0") for i in chosen]
    pictures = [_picture(file, f"Step {step}", remarks) for file, step in steps]
    return [picture for picture in pictures if picture is not None]


def manifest(scores: Sequence[Result]) -> str:
    """What scores by a protocol depend on, each manifest once, as YAML."""
    told = {json.dumps(s.manifest, sort_keys=True): s.manifest for s in scores if s.manifest}
    return yaml.safe_dump_all(told.values(), sort_keys=False, allow_unicode=True) if told else ""


def direction(metric: str) -> int:
    """1 if lower is better, -1 if higher is, 0 if that is not known."""
    return 1 if metric.startswith(LOWER_IS_BETTER) else -1 if metric.startswith(HIGHER_IS_BETTER) else 0


def best(scores: Sequence[Result]) -> Result:
    """The best of some scores of one metric."""
    return min(scores, key=lambda score: direction(score.metric) * score.value)


def number(value: float) -> str:
    """Four significant digits; thousands in full."""
    return f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"


def facts(config: str, environment: str) -> list[str]:
    """What was run and on what, as far as the two files tell."""
    try:
        run, machine = yaml.safe_load(config), json.loads(environment or "{}")
        known = {
            "method": " then ".join(name for name, _ in groupby(stage["objective"]["name"] for stage in run["stages"])),
            "teacher": run.get("teacher"),
            "seed": run.get("seed"),
            "device": machine.get("processor"),
            "started": machine.get("started"),
        }
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return [f"{name} {value}" for name, value in known.items() if value is not None]


def training_summary(logged: Sequence[Entry], validations: Sequence[Entry]) -> list[str]:
    """How long training took and where validation began, was best and ended."""
    sentences = []
    if logged:
        minutes, seconds = divmod(round(logged[-1]["seconds"]), 60)
        counted = logged[-1].get("evaluations")  # older runs did not count them
        spent = f" and {counted:,.0f} network evaluations" if counted else ""
        sentences.append(f"Trained for {logged[-1]['step']:,.0f} steps{spent} in {minutes} min {seconds:02} s.")
    if scored := [entry for entry in validations if "validation" in entry]:
        lowest = min(scored, key=lambda entry: entry["validation"])
        points = [f"{number(e['validation'])} at step {e['step']:,.0f}" for e in (scored[0], lowest, scored[-1])]
        sentences.append("Validation began at {}, was best with {} and ended at {}.".format(*points))
    return sentences


def health(logged: Sequence[Entry]) -> list[str]:
    """What the diagnostics say at the end of training, in words; empty where nothing was recorded."""
    if not any(name.startswith("health/") for entry in logged for name in entry):
        return []
    return [finding.text for finding in diagnose(logged)] or ["nothing in the recorded diagnostics looks wrong."]


def verdict(scores: Sequence[Result]) -> list[str]:
    """The student's best score beside the teacher's at the same and at any NFE, by the first metric that can tell."""
    metric = min((s.metric for s in scores), key=lambda m: (1, -1, 0).index(direction(m)), default=None)
    students = [s for s in scores if s.metric == metric and s.role == "student"]
    teachers = [s for s in scores if s.metric == metric and s.role == "teacher"]
    if not students:
        return [f"The teacher's best {metric} is {_how(best(teachers))}."] if teachers else []
    student = best(students)
    sentences = [f"The student's best {metric} is {_how(student)}."]
    fair = [s for s in teachers if s.n == student.n]
    for label, group in (("at the same NFE", [s for s in fair if s.nfe == student.nfe]), ("at any NFE", fair)):
        if group:
            top = best(group)
            ratio = f"; the student's is {student.value / top.value:.2f} times that" if top.value > 0 else ""
            sentences.append(f"The teacher's best {label} is {_how(top)}{ratio}.")
    if fair:
        as_good = [s.nfe for s in fair if best([s, student]) is s]
        needs = f"needs {min(as_good)} NFE to do as well" if as_good else "does as well at no NFE that was measured"
        sentences.append(f"The teacher {needs}.")
    elif teachers:
        sentences.append("The teacher was scored on other numbers of samples, so the two are not compared.")
    return sentences


def _how(score: Result) -> str:
    return f"{number(score.value)} ({score.solver}, {score.nfe} NFE, guidance {score.guidance:g}, {score.n:,} samples)"


def table(scores: Sequence[Result]) -> list[tuple[str, list[list[tuple[str, bool]]]]]:
    """Rows of cells (text, whether it is the best of its metric and number of samples) by role, model and solver."""
    metrics = list(dict.fromkeys(s.metric for s in scores))
    tops = {(s.metric, s.n): best([t for t in scores if (t.metric, t.n) == (s.metric, s.n)]).value for s in scores}

    def row(group: Sequence[Result]) -> list[tuple[str, bool]]:
        first, cells = group[0], {s.metric: s for s in group}
        texts = [(str(first.nfe), False), (str(first.steps), False), (f"{first.guidance:g}", False)]
        for metric in metrics:
            if (s := cells.get(metric)) is None:
                texts.append(("–", False))
                continue
            text = number(s.value)
            spread = "" if s.spread is None else f" ± {s.spread:.{len(text.partition('.')[2])}f}"
            texts.append((text + spread, direction(metric) != 0 and s.value == tops[metric, s.n]))
        seeds, seconds = ", ".join(map(str, first.seeds)), max(s.seconds for s in group)
        return [*texts, (f"{first.n:,}", False), (seeds, False), (f"{seconds:.1f}", False)]

    rows = [(key[:3], row(list(group))) for key, group in groupby(scores, key=lambda s: s.setting)]
    return [
        (f"{role} {model} · {solver}", [cells for _, cells in group])
        for (role, model, solver), group in groupby(rows, key=lambda item: item[0])
    ]


def quality_curves(scores: Sequence[Result]) -> list[Chart]:
    """Each metric against NFE: a line a role, model, solver and number of samples, the best guidance at each NFE."""
    charts = []
    for metric in dict.fromkeys(s.metric for s in scores):
        own = [s for s in scores if s.metric == metric]
        keys = {s.setting[:4] for s in own}
        lines = []
        for key, group in groupby(own, key=lambda s: s.setting[:4]):
            points = [best(list(same)) for _, same in groupby(group, key=lambda s: s.nfe)]
            rivals = {k for k in keys if k[0] == key[0]}
            telling = [str(part) for i, part in enumerate(key) if i in (0, 2) or len({k[i] for k in rivals}) > 1]
            look = "D" if key[0] == "student" else "o-"
            lines.append(Line(" ".join(dict.fromkeys(telling)), [(s.nfe, s.value) for s in points], look))
        charts.append(chart(metric, "NFE", lines, log_x=True))
    return charts


def training_curves(logged: Sequence[Entry]) -> list[tuple[str, list[Chart]]]:
    """A chart a logged quantity, grouped by the name before the slash, losses first; dotted where the stage changes."""
    names = {name for entry in logged for name in entry} - {*SPENT, "stage"}
    ordered = sorted(names, key=lambda name: (not name.startswith("loss/"), name))
    stages = [after["step"] for before, after in pairwise(logged) if before.get("stage") != after.get("stage")]
    groups = groupby(ordered, key=lambda name: name.partition("/")[0])
    return [(prefix, [_curve(name, logged, "step", stages) for name in group]) for prefix, group in groups]


def _curve(name: str, entries: Sequence[Entry], axis: str, marks: Sequence[float] = (), look: str = "-") -> Chart:
    points = [(entry[axis], entry[name]) for entry in entries if name in entry]
    return chart(name, axis, [Line(name, points, look)], marks)


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html")
