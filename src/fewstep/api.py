"""The Python interface: what the command line does, as functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.distill.config import Config, load_config
from fewstep.distill.data import to_bytes
from fewstep.distill.devices import join_world, pick_device
from fewstep.distill.run import Progress, Run
from fewstep.distill.shootout import curve, load_shootout, run_all
from fewstep.errors import UserError
from fewstep.eval.compare import compare as compare_models
from fewstep.eval.evaluate import ByReference, Score, cycled_labels, draw, draw_from, merged, read_scores
from fewstep.eval.frontier import draw_frontier
from fewstep.eval.networks.weights import Place
from fewstep.eval.pictures import save_sample
from fewstep.eval.protocol import Evaluator, Protocol
from fewstep.eval.references import load_reference
from fewstep.eval.report import write_report
from fewstep.eval.rewards import REWARDS, find_reward, win_rate
from fewstep.eval.score import ByProtocol
from fewstep.eval.sweep import Line, compare_solvers, write_sweep
from fewstep.eval.tables import markdown
from fewstep.eval.validation import PromptValidation, Validation
from fewstep.models.condition import Condition
from fewstep.models.guidance import Guidance
from fewstep.models.hub.encode import encode_pictures, encode_prompts
from fewstep.models.hub.encoded import PROMPTS, read_prompts
from fewstep.models.hub.export import Form
from fewstep.models.hub.export import export as export_model
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.store import Model, Size, load_model, pipeline_of, place_of, write_tensors, write_text
from fewstep.pictures import require_av
from fewstep.samplers.dc_solver import Searched, goals, search
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.sample import SampleNoise, plan, steps_within
from fewstep.samplers.statistics import estimate

Source = str | Path
SEARCH_SEED = 12345  # of the samples that solvers are tuned on: far from those that people compare


def train(
    config: Config | Source, *overrides: str, resume: Source | None = None, progress: Progress | None = None
) -> Path:
    """Distils (or, for a config with ``model:``, pretrains) and returns the run folder.

    ``overrides`` are ``"key=value"`` strings. ``resume`` continues the run in that folder, whose own config then
    counts. Raises ``UserError`` on a mistake in the config and ``Interrupted`` after a Ctrl-C.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    return train_run(config, resume, progress).folder


def train_run(config: Config, resume: Source | None, progress: Progress | None) -> Run:
    world, device = join_world(config.device)
    run = Run.reopen(resume, device, world) if resume else Run.create(config, device, world)
    settings = run.config.validation
    validate: Validation | PromptValidation | None = None
    if settings.every and run.prompts is not None and run.pipeline is not None:
        validate = PromptValidation(settings, run.pipeline, run.prompts, run.folder)
    elif settings.every:
        reference = load_reference(settings.reference, "train", device)
        validate = Validation(settings, reference, run.folder)
    run.train(validate, progress)
    return run


def load(source: Source, device: str = "auto", size: Size | None = None) -> Model:
    """The student of a run folder, a model folder, an embedded model by name, or a diffusers pipeline, on its device.
    ``size`` (height, width, frames in pixels) is for pipelines.

    Raises ``UserError`` if there is no such model, or the run has no student yet.
    """
    folder = Path(source)
    if (folder / "config.yaml").is_file():
        if not (folder / "student" / "config.json").is_file():
            raise UserError(
                f"The run {folder} has no student yet: it did not finish. Continue it with --resume {folder}."
            )
        source = folder / "student"
    model = load_model(source, size=size)
    model.denoiser.to(pick_device(device))
    return model


def sample(
    source: Source | Model,
    *,
    n: int = 80,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    solver: str | None = None,
    guidance: float = 1.0,
    grid: str = "time",
    seed: int = 0,
    device: str = "auto",
) -> Tensor:
    """``n`` images, uint8 [n, C, H, W]; the labels are repeated in turn (all classes, if none are given). Of a
    text-conditioned model, an image for each of ``prompts`` instead, or a video, uint8 [n, F, 3, H, W].

    A student uses its own rule and times unless told otherwise; a teacher defaults to 32 Euler steps.
    """
    model = source if isinstance(source, Model) else load(source, device)
    solver, steps = _rule(model, solver, steps)
    if prompts is not None or model.config.backbone.get("name") == "diffusers":
        if not prompts:
            raise UserError("This model takes prompts: give at least one.")
        plan(solver, steps, model.config, grid, model.path, guidance)  # refuses, before anything is loaded or encoded
        folder = pipeline_of(model)
        pipeline = folder.pipeline().to(model.device)
        condition = folder.condition(pipeline, prompts)
        x0 = draw_from(
            model, condition, range(len(prompts)), solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed,
            batch=8,
        ).x0  # fmt: skip
        return folder.pictures(pipeline, x0)
    classes = model.config.classes
    wanted = list(range(classes)) if labels is None else list(labels)
    wrong = [label for label in wanted if not 0 <= label < classes]
    if wrong or not wanted:
        raise UserError(f"Labels must be between 0 and {classes - 1}, got {wrong or 'none'}.")
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    row = torch.tensor(wanted)[torch.arange(n) % len(wanted)]
    return to_bytes(draw(model, row, solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed).x0)


def sample_files(
    source: Source | Model, prompts: Sequence[str], folder: Source, *, seeds: Sequence[int] = (0,), batch: int = 8,
    steps: int | None = None, solver: str | None = None, guidance: float = 1.0, grid: str = "time",
    video: Literal["gif", "mp4"] = "gif", device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> list[Path]:  # fmt: skip
    """A file for each prompt and seed, ``00000-0.png`` (of a video model ``.gif`` or ``.mp4``), whatever the batch.
    Those that are there already are kept, so that a run can be continued. ``progress`` is told how many of how many."""
    model = source if isinstance(source, Model) else load(source, device)
    pipeline_folder = pipeline_of(model)
    solver, steps = _rule(model, solver, steps)
    plan(solver, steps, model.config, grid, model.path, guidance)  # refuses, before anything is loaded or encoded
    suffix = video if len(model.config.shape) == 4 else "png"
    if suffix == "mp4":
        require_av()
    files = {seed: [Path(folder) / f"{number:05d}-{seed}.{suffix}" for number in range(len(prompts))] for seed in seeds}
    left = {seed: [number for number, file in enumerate(own) if not file.is_file()] for seed, own in files.items()}
    written = sum(len(own) - len(left[seed]) for seed, own in files.items())
    if any(left.values()):
        pipeline = pipeline_folder.pipeline().to(model.device)
        condition = pipeline_folder.condition(pipeline, prompts)
    for seed, numbers in left.items():
        for low in range(0, len(numbers), batch):
            some = numbers[low : low + batch]
            rows = condition.index(torch.tensor(some, device=model.device))
            x0 = draw_from(model, rows, some, solver=solver, steps=steps, guidance=guidance, grid=grid, seed=seed).x0
            for number, picture in zip(some, pipeline_folder.pictures(pipeline, x0), strict=True):
                save_sample(picture, files[seed][number])
            written += len(some)
            if progress is not None:
                progress(written, len(prompts) * len(files))
    return [file for own in files.values() for file in own]


def _rule(model: Model, solver: str | None, steps: int | None) -> tuple[str, int | None]:
    """The solver and steps wanted or, by default, a student's own rule and times, a teacher's 32 Euler steps."""
    few = model.config.few_step
    return solver or ("student" if few else "euler"), steps if steps is not None or few else 32


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
    known = read_scores(file) if file and file.is_file() else _teacher_scores(Path(source), judge.network_sha256)
    requests = [
        (rule, steps_within(rule, count, scale != 1, model.config) if nfe else count, scale)
        for rule in solvers for count in nfe or steps for scale in guidance
    ]  # fmt: skip
    for rule, count, scale in requests:
        plan(rule, count, model.config, grid, model.path, scale)
    judge.check(model)
    scores: list[Score] = []
    for (rule, count, scale), own in product(dict.fromkeys(requests), judge.seeds):
        label = f"{rule} {count} steps, guidance {scale:g}"
        scores += judge(
            model, name=name or Path(source).name, solver=rule, steps=count, guidance=scale, grid=grid, seed=own,
            progress=partial(progress, label) if progress else None,
        )  # fmt: skip
        if file is not None:
            write_text(
                json.dumps([score.model_dump(exclude_none=True) for score in merged(known, scores)], indent=1) + "\n",
                file,
            )
    return scores


def evaluate_images(
    source: Source, protocol: Protocol, place: Place | None = None, *, skip_bad: bool = False, device: str = "auto",
    json_file: Source | None = None, name: str | None = None,
) -> list[Score]:  # fmt: skip
    """Scores the images of a folder or an archive. Raises ``UserError`` on images that cannot be scored."""
    judge = _judge(protocol, place, pick_device(device), skip_bad)
    scores = judge.of_images(Path(source), name or Path(source).name)
    if json_file is not None:
        file = Path(json_file)
        known = read_scores(file) if file.is_file() else []
        write_text(
            json.dumps([score.model_dump(exclude_none=True) for score in merged(known, scores)], indent=1) + "\n", file
        )
    return scores


def _judge(
    protocol: Protocol, place: Place | None, device: torch.device, skip_bad: bool = False
) -> ByReference | ByProtocol:
    if protocol.embedded:
        real = load_reference(str(protocol.reference), "test", device)
        return ByReference(real, protocol.n, protocol.seeds, protocol.name, skip_bad)
    return ByProtocol(Evaluator(protocol, place or Place.of(), device, skip_bad))


def _teacher_scores(run: Path, features_sha256: str | None) -> list[Score]:
    """What is known of a run's teacher, from the ``eval.json`` beside its weights, if the same features made it."""
    if not (run / "config.yaml").is_file() or (teacher := load_config(run / "config.yaml").teacher) is None:
        return []
    file = load_model(teacher).path / "eval.json"
    scores = read_scores(file) if file.is_file() else []
    return [score for score in scores if score.features_sha256 == features_sha256]


def _default_json(source: Path) -> Path | None:
    return source / "eval.json" if (source / "config.yaml").is_file() else None


def shootout(config: Source, progress: Callable[[str], Progress] | None = None, device: str = "auto") -> list[Score]:
    """Trains and scores every method and seed of a shootout file; writes ``shootout.json``, ``curves.json`` (validation
    over training evaluations, by method and seed) and ``frontier.png`` into its folder.

    A score's ``model`` is the method and its ``seed`` that of the training, so that tables show mean and deviation.
    What is finished is kept: call it again after an interruption. ``progress(run name)`` makes a run's callback.
    """
    settings = load_shootout(config)
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
    features = scores[0].features_sha256
    draw_frontier([*scores, *_teacher_scores(runs[0][2], features)], curves, folder / "frontier.png")
    return scores


def encode(
    teacher: Source, prompts: Source, out: Source, *, sizes: Sequence[tuple[int, int]] = (), frames: int = 1,
    batch: int = 16, rows: int = 512, device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Encodes the prompts of a text file, one a line, with a pipeline's text encoders, for ``data.kind=prompts``; of a
    folder of pictures (videos, with ``frames``) with captions beside them (``a.png``, ``a.txt``), also these, with its
    VAE, each at that of the ``sizes`` (height, width) which is nearest in proportions.

    Returns the number of prompts or files. What is there already is kept. Raises ``UserError`` on a line that is empty
    or not UTF-8, on a pipeline without text encoders, and on a folder of other prompts.
    """
    folder, given, place = PipelineFolder.open(place_of(teacher)), Path(prompts), pick_device(device)
    if given.is_dir():
        return encode_pictures(
            folder, given, Path(out), sizes=sizes, frames=frames, batch=batch, rows=rows, device=place,
            progress=progress,
        )  # fmt: skip
    lines = read_prompts(given)
    encode_prompts(folder, lines, Path(out), batch=batch, rows=rows, device=place, progress=progress)
    return len(lines)


def export(run: Source, form: Form, out: Source, device: str = "cpu") -> Path:
    """A student as a diffusers pipeline, its denoiser alone (``merged``), a LoRA file, or one for ComfyUI, compared
    with the student before it gets its name. A run's config and scores go into the model card."""
    folder, card = Path(run), ""
    if (folder / "config.yaml").is_file():
        card = f"## Config\n\n```yaml\n{(folder / 'config.yaml').read_text(encoding='utf-8')}```\n"
        if (folder / "eval.json").is_file():
            card += f"\n## Scores\n\n{markdown(read_scores(folder / 'eval.json'))}"
    return export_model(load(run, device), form, Path(out), card)


def make_pairs(
    source: Source, file: Source, *, n: int = 10_000, solver: str = "heun", steps: int = 18, guidance: float = 1.0,
    seed: int = 0, device: str = "auto", progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Noise and what a teacher's solver makes of it, ``n`` pairs with labels in turn, as a safetensors file."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    model = load(source, device)
    labels = cycled_labels(n, model.config.classes)
    samples = draw(model, labels, solver=solver, steps=steps, guidance=guidance, seed=seed, progress=progress)
    noise = SampleNoise(seed, range(n), model.config.shape, torch.device("cpu"))()
    start = float(model.denoiser.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)))
    write_tensors({"noise": start * noise, "x0": samples.x0, "labels": labels}, Path(file))


def make_statistics(
    source: Source, file: Source, *, n: int = 1024, intervals: int = 120, guidance: float = 1.0, seed: int = 0,
    device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """The statistics that DPM-Solver-v3 needs of a class-conditional model, over ``n`` of its own samples. The solver
    finds them as ``statistics.safetensors`` beside the model's weights. Goes on where it stopped."""
    model = load(source, device)
    labels = cycled_labels(n, _classes(model))
    x0 = draw(model, labels, solver="heun", steps=16, guidance=guidance, seed=SEARCH_SEED + seed).x0
    condition = Condition.of_labels(labels, model.config.classes)
    estimate(
        model.denoiser, x0.to(model.device), condition.to(model.device), Path(file), guidance=Guidance(guidance),
        intervals=intervals, seed=seed, progress=progress,
    )  # fmt: skip


def search_ratios(
    source: Source, file: Source, *, steps: Sequence[int], guidance: Sequence[float], order: int = 2, n: int = 32,
    seed: int = 0, device: str = "auto", progress: Callable[[int, int], None] | None = None,
) -> None:  # fmt: skip
    """Searches DC-Solver's ratios for every number of steps and scale, against runs of twenty times the steps. The
    solver finds them as ``dc_solver.json`` beside the model's weights."""
    model = load(source, device)
    labels = cycled_labels(n, _classes(model))
    condition = Condition.of_labels(labels, model.config.classes).to(model.device)
    noise = SampleNoise(SEARCH_SEED + seed, range(n), model.config.shape, model.device)()
    found: list[Searched] = []
    wanted = [(count, scale) for scale in guidance for count in steps]
    for done, (count, scale) in enumerate(wanted, start=1):
        times = plan("unipc_2", count, model.config).times
        predict = Predictor(model.denoiser, condition, Guidance(scale))
        x = predict.nodes(times)[0].sigma * noise
        ratios = search(predict, x, times, goals(predict, x, times), order=order)
        found.append(Searched(steps=count, guidance=scale, order=order, ratios=ratios))
        if progress is not None:
            progress(done, len(wanted))
    write_text(json.dumps([one.model_dump() for one in found], indent=1) + "\n", Path(file))


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
    labels = cycled_labels(n, _classes(model))
    real = load_reference(reference, "test", model.device) if reference else None
    lines = compare_solvers(
        model, labels, real, Path(folder), name=Path(source).name, solvers=solvers, nfe=nfe, grids=grids,
        guidance=guidance, long=long, seed=seed, progress=progress,
    )  # fmt: skip
    write_sweep(lines, Path(folder))
    return lines


def _classes(model: Model) -> int:
    if not model.config.classes:
        raise UserError("This is for class-conditional models; this one takes prompts.")
    return model.config.classes


def make_preferences(
    source: Source, file: Source, *, reward: str, n: int = 2_000, candidates: int = 4, solver: str | None = None,
    steps: int | None = None, guidance: float = 1.0, reference: str = "fashion", seed: int = 0, device: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Preference pairs as a safetensors file: of ``candidates`` samples for each of ``n`` labels, that of the highest
    ``reward`` is the ``winner`` and that of the lowest the ``loser``.

    A student uses its own rule unless told otherwise; a teacher needs ``solver`` and ``steps``. Raises ``UserError`` on
    an unknown reward or fewer than two candidates.
    """
    judge = find_reward(reward)
    if n < 1 or candidates < 2:
        raise UserError(f"A pair needs two candidates and n at least 1, got {candidates} and {n}.")
    model = load(source, device)
    network = load_reference(reference, "train", model.device).network
    labels = cycled_labels(n, model.config.classes)
    x0 = torch.stack([
        draw(
            model, labels, solver=solver or "student", steps=steps, guidance=guidance, seed=seed, first=k * n,
            progress=partial(lambda before, done: progress(before + done), k * n) if progress else None,
        ).x0
        for k in range(candidates)
    ])  # fmt: skip
    rewards = torch.stack([judge(network, to_bytes(images), labels) for images in x0])
    each = torch.arange(n)
    pairs = {"winner": x0[rewards.argmax(0), each], "loser": x0[rewards.argmin(0), each], "labels": labels}
    write_tensors(pairs, Path(file))


def win_rates(
    ours: Source, theirs: Source, *, n: int = 2_000, solver: str | None = None, steps: int | None = None,
    guidance: float = 1.0, reference: str = "fashion", seed: int = 1, device: str = "auto",
    json_file: Source | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """For every reward, how often ``ours`` gets more of it than ``theirs`` on the same label and noise, with Wilson's
    95 % interval, and both means. Sampled as in ``make_preferences``, with another seed by default."""
    drawn = []
    for source in (ours, theirs):
        model = load(source, device)
        labels = cycled_labels(n, model.config.classes)
        samples = draw(model, labels, solver=solver or "student", steps=steps, guidance=guidance, seed=seed)
        drawn.append(to_bytes(samples.x0))
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
