"""The report of a run: one self-contained HTML page, computed only from the files of the run folder."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import jinja2
import yaml

from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.core.json_files import read_json_lines
from fewstep.core.yaml_files import parse_yaml
from fewstep.eval.report.comparison import ANIMATED
from fewstep.eval.report.curves import MINIMUM_POINTS, incomparable, quality_curves, training_curves, validation_curves
from fewstep.eval.report.diagnosis import MINIMUM_VALUES, diagnose
from fewstep.eval.report.embedded_images import embed_image, embed_steps, embed_video
from fewstep.eval.report.run_files import Entry, Result, read_metrics, read_results, read_text
from fewstep.eval.report.score_table import columns, explanations, number, origins, table, verdict
from fewstep.eval.score_files import Score


def write_report(run: str | Path) -> Path:
    """Writes ``report.html`` into a run folder and returns its path. The same folder always gives the same bytes.

    Raises ``UserError`` if the folder is not a run (it has no ``config.yaml``) or if the page cannot be written.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml.")
    remarks: list[str] = []
    samples = run / "samples"
    logged, validations = read_metrics(run / "metrics.jsonl", remarks)
    results = read_results(run / "eval.json", remarks)
    config, environment = read_text(run / "config.yaml"), read_text(run / "environment.json")
    moving = samples / ANIMATED
    still_or_moving = moving if moving.is_file() else samples / "comparison.png"
    comparison = embed_image(still_or_moving, "Teacher and student from the same noise", remarks)
    if comparison is None:
        remarks.append("fewstep.api.report.compare_images(run) writes samples/comparison.png.")
    diversity = None
    if (samples / "diversity.png").exists():
        diversity = embed_image(samples / "diversity.png", "Several noises for one condition", remarks)
    shown = embed_steps(samples, remarks)
    if not shown:
        remarks.append("No sample images were saved during training.")
    page = _template().render(
        name=run.resolve().name,
        facts=facts(config, environment),
        summary=[*training_summary(logged, validations), *disturbances(run), *verdict(results)],
        comparison=comparison,
        diversity=diversity,
        video=embed_video(samples / "comparison.mp4"),
        columns=[f"{metric} {arrow}".strip() for metric, arrow in columns(results).items()],
        origins=origins(results),
        table=table(results),
        explanations=explanations(results),
        downloads=downloads(read_text(run / "eval.json")) if results else [],
        quality=quality_curves(results),
        incomparable=incomparable(results),
        validation=validation_curves(validations),
        training=training_curves(logged),
        health=health(logged),
        samples=shown,
        previews=embed_steps(run / "previews", remarks),
        config=config,
        manifest=manifest(results),
        environment=environment,
        remarks=remarks,
    )
    write_text(page, run / "report.html")
    return run / "report.html"


def facts(config: str, environment: str) -> list[str]:
    """Method, teacher, seed, device and start of the run, as far as the two files contain them."""
    try:
        run, machine = parse_yaml(config, "config.yaml"), json.loads(environment or "{}")
        known = {
            "method": " then ".join(name for name, _ in groupby(stage["objective"]["name"] for stage in run["stages"])),
            "teacher": run.get("teacher"),
            "seed": run.get("seed"),
            "device": machine.get("processor"),
            "started": machine.get("started"),
        }
    except (UserError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return [f"{name} {value}" for name, value in known.items() if value is not None]


def training_summary(logged: Sequence[Entry], validations: Sequence[Entry]) -> list[str]:
    """The cost of training, and the first, best and last validation."""
    sentences = []
    if logged:
        minutes, seconds = divmod(round(logged[-1]["seconds"]), 60)
        evaluations = logged[-1].get("evaluations")  # missing in older runs
        cost = f" and {evaluations:,.0f} network evaluations" if evaluations else ""
        sentences.append(f"Trained for {logged[-1]['step']:,.0f} steps{cost} in {minutes} min {seconds:02} s.")
    scored = [entry for entry in validations if "validation" in entry]
    points = [f"{number(entry['validation'])} at step {entry['step']:,.0f}" for entry in scored]
    if len(scored) >= MINIMUM_POINTS:
        lowest = points[min(range(len(scored)), key=lambda k: scored[k]["validation"])]
        sentences.append(f"Validation started at {points[0]}, was best with {lowest} and ended at {points[-1]}.")
    elif points:
        sentences.append(f"Validation was {', then '.join(points)}.")
    return sentences


def disturbances(run: Path) -> list[str]:
    """How often the run was resumed, and how many of its updates were not applied."""
    counts = {}
    for name in ("resumes.jsonl", "lost_updates.jsonl"):
        with suppress(UserError):
            counts[name] = len(read_json_lines(run / name)[0])
    resumed, lost = counts.get("resumes.jsonl", 0), counts.get("lost_updates.jsonl", 0)
    return [
        *([f"Resumed {resumed} time{'s'[: resumed - 1]} (resumes.jsonl)."] if resumed else []),
        *([f"{lost} update{'s'[: lost - 1]} not applied (lost_updates.jsonl)."] if lost else []),
    ]


def health(logged: Sequence[Entry]) -> list[str]:
    """The findings of the diagnosis at the end of training, or that there are none, or too few records; empty if no
    health numbers were recorded."""
    records = sum(any(name.startswith("health/") for name in entry) for entry in logged)
    found = [finding.text for finding in diagnose(logged)]
    if records and not found:
        enough = records >= MINIMUM_VALUES
        found = ["no problems found in the recorded diagnostics."] if enough else [
            f"{records} record{'s'[: records - 1]}, too few for a diagnosis (at least {MINIMUM_VALUES})."
        ]  # fmt: skip
    return found


def downloads(scores: str) -> list[tuple[str, str]]:
    """The run's scores as JSON and as CSV without the manifests: names of files, and their contents as addresses."""
    rows = json.loads(scores)
    table = io.StringIO()
    writer = csv.DictWriter(table, [name for name in Score.model_fields if name != "manifest"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    files = {"scores.json": ("application/json", scores), "scores.csv": ("text/csv", table.getvalue())}
    return [
        (name, f"data:{kind};base64,{base64.b64encode(content.encode()).decode()}")
        for name, (kind, content) in files.items()
    ]


def manifest(results: Sequence[Result]) -> str:
    """What scores by a protocol depend on, each manifest once, as YAML."""
    unique = {json.dumps(result.manifest, sort_keys=True): result.manifest for result in results if result.manifest}
    return yaml.safe_dump_all(unique.values(), sort_keys=False, allow_unicode=True) if unique else ""


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html")
