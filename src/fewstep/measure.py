"""What measures: scores, solvers side by side, methods side by side, pictures and the report of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fewstep.api import Source, load, train_run
from fewstep.distill.config import load_config
from fewstep.distill.devices import pick_device
from fewstep.distill.run import Progress
from fewstep.distill.shootout import curve, load_shootout, run_all
from fewstep.eval.by_protocol import ByProtocol
from fewstep.eval.by_reference import ByReference
from fewstep.eval.compare import compare as compare_models
from fewstep.eval.draw import How, draw, planned
from fewstep.eval.frontier import draw_frontier
from fewstep.eval.networks.weights import Place
from fewstep.eval.protocol import Protocol
from fewstep.eval.references import load_reference
from fewstep.eval.report import write_report
from fewstep.eval.rewards import REWARDS, win_rate
from fewstep.eval.scores import Score, merged, read_scores, write_scores
from fewstep.eval.sweep import Line, compare_solvers, write_sweep
from fewstep.models.hub.encoded import PROMPTS, read_prompts
from fewstep.models.store import load_model, reserve, write_text
from fewstep.pictures import to_bytes
from fewstep.samplers.sample import steps_within


def evaluate(
    source: Source,
    *,
    protocol: Protocol | None = None,
    place: Place | None = None,
    reference: str = "fashion",
    steps: Sequence[int] = (1, 2, 4),
    nfe: Sequence[int] = (),
    solver: Sequence[str] = (),
    guidance: Sequence[float] = (1.0,),
    grid: str = "time",
    n: int = 10_000,
    seed: int = 0,
    device: str = "auto",
    json_file: Source | None = None,
    name: str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Score]:
    """Scores every combination of ``solver``, ``steps`` and ``guidance``. A teacher's steps are spaced as ``grid`` says
    (see ``samplers.grids``). A ``protocol`` says what is measured, on how many samples of which seeds and against what
    (``place``: where the weights of its networks are); without one, ``n`` samples are compared with the test images of
    an embedded ``reference``.

    ``nfe`` takes the place of ``steps``: as many steps as that number of evaluations allows. After each combination the
    scores are merged into ``json_file``; for a run folder that is its ``eval.json``, which also takes over the scores
    that its teacher came with. Raises ``UserError`` on a request that cannot be met, before anything is computed.
    """
    model = load(source, device)
    judge: ByReference | ByProtocol
    if protocol is None:
        judge = ByReference(load_reference(reference, "test", model.device), n, (seed,))
    else:
        judge = _judge(protocol, place, model.device)
    solvers = list(solver) or ["student" if model.config.few_step else "euler"]
    file = Path(json_file) if json_file else _default_json(Path(source))
    known = read_scores(file) if file and file.is_file() else _teacher_scores(Path(source), judge.hashes)
    requests = [
        How(rule, steps_within(rule, count, scale != 1, model.config) if nfe else count, scale, grid)
        for rule in solvers for count in nfe or steps for scale in guidance
    ]  # fmt: skip
    for how in requests:
        planned(model, how)
    judge.check(model)
    if file is not None:
        reserve(file)
    scores: list[Score] = []
    for how, own in product(dict.fromkeys(requests), judge.seeds):
        label = f"{how.solver} {how.steps} steps, guidance {how.guidance:g}"
        told = partial(progress, label) if progress else None
        scores += judge(model, name or Path(source).name, how._replace(seed=own), told)
        if file is not None:
            write_scores(merged(known, scores), file)
    return scores


def evaluate_images(
    source: Source, protocol: Protocol, place: Place | None = None, *, skip_bad: bool = False, device: str = "auto",
    json_file: Source | None = None, name: str | None = None,
) -> list[Score]:  # fmt: skip
    """Scores the images of a folder or an archive. Raises ``UserError`` on images that cannot be scored."""
    judge = _judge(protocol, place, pick_device(device), skip_bad)
    known: list[Score] = []
    if json_file is not None:
        reserve(json_file)
        known = read_scores(Path(json_file)) if Path(json_file).is_file() else []
    scores = judge.of_images(Path(source), name or Path(source).name)
    if json_file is not None:
        write_scores(merged(known, scores), Path(json_file))
    return scores


def _judge(
    protocol: Protocol, place: Place | None, device: torch.device, skip_bad: bool = False
) -> ByReference | ByProtocol:
    if protocol.embedded:
        real = load_reference(str(protocol.reference), "test", device)
        return ByReference(real, protocol.n, protocol.seeds, protocol.name, skip_bad)
    return ByProtocol(protocol, place or Place.of(), device, skip_bad)


def _teacher_scores(run: Path, hashes: set[str]) -> list[Score]:
    """What is known of a run's teacher, from the ``eval.json`` beside its weights, if the same features made it."""
    if not (run / "config.yaml").is_file() or (teacher := load_config(run / "config.yaml").teacher) is None:
        return []
    file = load_model(teacher).path / "eval.json"
    scores = read_scores(file) if file.is_file() else []
    return [score for score in scores if score.features_sha256 in hashes]


def _default_json(source: Path) -> Path | None:
    return source / "eval.json" if (source / "config.yaml").is_file() else None


def sweep(
    source: Source, *, solvers: Sequence[str], nfe: Sequence[int], folder: Source, grids: Sequence[str] = ("time",),
    guidance: float = 1.0, n: int = 2_000, long: int = 1000, reference: str | None = None, seed: int = 0,
    device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> list[Line]:  # fmt: skip
    """Every solver, grid and budget of evaluations of a class-conditional teacher, against ``long`` steps of UniPC-3
    from the same noise (and, with ``reference``, scored); writes ``sweep.json``, ``sweep.md`` and ``sweep.png``. What
    is in ``folder`` already is kept, so that a sweep goes on, or gets more solvers.

    Raises ``UserError`` before it samples: on an unknown solver or grid, a solver with noise of its own, and a budget
    that allows no step.
    """
    model = load(source, device)
    labels = model.labels(n)
    real = load_reference(reference, "test", model.device) if reference else None
    lines = compare_solvers(
        model, labels, real, Path(folder), name=Path(source).name, solvers=solvers, nfe=nfe, grids=grids,
        guidance=guidance, long=long, seed=seed, progress=progress,
    )  # fmt: skip
    write_sweep(lines, Path(folder))
    return lines


def shootout(
    config: Source, *overrides: str, progress: Callable[[str], Progress] | None = None, device: str = "auto"
) -> list[Score]:
    """Trains and scores every method and seed of a shootout file; writes ``shootout.json``, ``curves.json`` (validation
    over training evaluations, by method and seed) and ``frontier.png`` into its folder.

    ``overrides`` are ``"key=value"`` strings, ``seeds=[0]`` for a first look. A score's ``model`` is the method and
    its ``seed`` that of the training, so that tables show mean and deviation.
    What is finished is kept: call it again after an interruption. ``progress(run name)`` makes a run's callback.
    """
    settings = load_shootout(config, overrides)
    runs = run_all(
        settings, lambda entry, resume: train_run(entry, resume, progress(Path(entry.out).name) if progress else None)
    )
    entries = []
    curves: dict[str, list[list[tuple[float, float]]]] = {method: [] for method in settings.methods}
    for method, seed, folder in runs:
        curves[method].append(curve(settings, method, folder))
        file = folder / "eval.json"
        own = [score for score in read_scores(file) if score.role == "student"] if file.is_file() else []
        few = load_model(folder / "student").config.few_step
        wanted = settings.steps or ((len(few.times),) if few else ())
        missing = [k for k in wanted if (k, settings.n) not in {(score.steps, score.n) for score in own}]
        if missing:
            own += evaluate(folder, reference=settings.reference, steps=missing, n=settings.n, device=device)
        last = json.loads((folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        training = {"training_seconds": last["seconds"], "training_evaluations": settings.evaluations}
        entries += [
            score.model_copy(update={"model": method, "seed": seed}).model_dump(exclude_none=True) | training
            for score in own
            if score.steps in wanted and score.n == settings.n
        ]
    folder = Path(settings.out)
    write_text(json.dumps(entries, indent=1) + "\n", folder / "shootout.json")
    write_text(json.dumps(curves) + "\n", folder / "curves.json")
    scores = read_scores(folder / "shootout.json")
    teachers = _teacher_scores(runs[0][2], {scores[0].features_sha256})
    draw_frontier([*scores, *teachers], curves, folder / "frontier.png")
    return scores


def win_rates(
    ours: Source, theirs: Source, *, n: int = 2_000, solver: str | None = None, steps: int | None = None,
    guidance: float = 1.0, reference: str = "fashion", seed: int = 1, device: str = "auto",
    json_file: Source | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """For every reward, how often ``ours`` gets more of it than ``theirs`` on the same label and noise, with Wilson's
    95 % interval, and both means. Sampled as in ``make_preferences``, with another seed by default."""
    if json_file is not None:
        reserve(json_file)
    drawn = []
    for source in (ours, theirs):
        model = load(source, device)
        labels = model.labels(n)
        drawn.append(to_bytes(draw(model, labels, How(solver or "student", steps, guidance, seed=seed)).x0))
    network = load_reference(reference, "train", model.device).network
    results = []
    for name, judge in REWARDS.items():
        a, b = (judge(network, images, labels) for images in drawn)
        rate, low, high = win_rate(a, b)
        means = {"ours": a.mean().item(), "theirs": b.mean().item()}
        results.append({"reward": name, "win_rate": rate, "low": low, "high": high, **means, "n": n, "seed": seed})
    if json_file is not None:
        write_text(json.dumps(results, indent=1) + "\n", Path(json_file))
    return results


def compare(run: Source, device: str = "auto", columns: int = 20, seed: int = 0, guidance: float | None = None) -> Path:
    """``samples/comparison.png``: teacher and student of a run from the same noise, a row each, for all classes or for
    prompts spread over those that the run was trained on (of videos the first frames, and all in ``comparison.mp4``
    where PyAV is installed); and ``samples/diversity.png``: several noises for some of these conditions.

    The teacher is shown at 16 Euler steps with ``guidance`` (by default 1.5, and 2 for prompts) and, unguided, at as
    many evaluations as the student; a teacher that is a student itself, by its own rule.
    """
    folder = Path(run)
    config = load_config(folder / "config.yaml")
    student = load(folder, device)
    teacher = load(config.teacher, device, config.size) if config.teacher is not None else None
    prompts = [] if student.config.classes else read_prompts(Path(config.data.path or "") / PROMPTS)
    return compare_models(student, teacher, prompts, folder / "samples", columns=columns, seed=seed, guidance=guidance)


def report(run: Source) -> Path:
    """Writes ``report.html`` into a run folder and returns its path."""
    return write_report(Path(run))
