"""The report of a run: one self-contained HTML page, computed only from the files of the run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2
import yaml

from fewstep.core.errors import UserError
from fewstep.core.files import write_text
from fewstep.eval.report.curves import quality_curves, training_curves, validation_curves
from fewstep.eval.report.diagnosis import diagnose
from fewstep.eval.report.embedded_images import embed_image, embed_samples, embed_video
from fewstep.eval.report.run_files import Entry, Result, read_metrics, read_results, read_text
from fewstep.eval.report.score_table import columns, number, origins, table, verdict


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
    comparison = embed_image(samples / "comparison.png", "Teacher and student from the same noise", remarks)
    diversity = None
    if (samples / "diversity.png").exists():
        diversity = embed_image(samples / "diversity.png", "Several noises for one condition", remarks)
    page = _template().render(
        name=run.resolve().name,
        facts=facts(config, environment),
        summary=[*training_summary(logged, validations), *verdict(results)],
        comparison=comparison,
        diversity=diversity,
        video=embed_video(samples / "comparison.mp4"),
        metrics=columns(results),
        origins=origins(results),
        table=table(results),
        quality=quality_curves(results),
        validation=validation_curves(validations),
        training=training_curves(logged),
        health=health(logged),
        samples=embed_samples(samples, remarks),
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
    """The cost of training, and the first, best and last validation."""
    sentences = []
    if logged:
        minutes, seconds = divmod(round(logged[-1]["seconds"]), 60)
        evaluations = logged[-1].get("evaluations")  # missing in older runs
        cost = f" and {evaluations:,.0f} network evaluations" if evaluations else ""
        sentences.append(f"Trained for {logged[-1]['step']:,.0f} steps{cost} in {minutes} min {seconds:02} s.")
    if scored := [entry for entry in validations if "validation" in entry]:
        lowest = min(scored, key=lambda entry: entry["validation"])
        points = [f"{number(e['validation'])} at step {e['step']:,.0f}" for e in (scored[0], lowest, scored[-1])]
        sentences.append("Validation started at {}, was best with {} and ended at {}.".format(*points))
    return sentences


def health(logged: Sequence[Entry]) -> list[str]:
    """The findings of the diagnosis at the end of training; empty if no health numbers were recorded."""
    if not any(name.startswith("health/") for entry in logged for name in entry):
        return []
    return [finding.text for finding in diagnose(logged)] or ["no problems found in the recorded diagnostics."]


def manifest(results: Sequence[Result]) -> str:
    """What scores by a protocol depend on, each manifest once, as YAML."""
    unique = {json.dumps(result.manifest, sort_keys=True): result.manifest for result in results if result.manifest}
    return yaml.safe_dump_all(unique.values(), sort_keys=False, allow_unicode=True) if unique else ""


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template("report.html")
