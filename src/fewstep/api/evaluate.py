"""Scores: of a model or of images, by a protocol or by a bundled reference; win rates of one model over another."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.api.models import Source, checkpoint_of, is_run, load, name_of, noise_image, run_of
from fewstep.api.reference import classifier_for, reference_for
from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.files import check_writable
from fewstep.core.registry import Registry
from fewstep.core.tables import read_texts
from fewstep.distill.run_folder import teacher_of
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.evaluate_reference import ReferenceEvaluator
from fewstep.eval.hashes import model_sha256
from fewstep.eval.networks.features import ClassifierFeatures
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol
from fewstep.eval.references import load_reference
from fewstep.eval.rewards.registry import PROMPT_REWARDS, REWARDS, rate
from fewstep.eval.rewards.win_rate import win_rate
from fewstep.eval.score_files import Score, merge, read_scores, write_scores
from fewstep.models.loading import Model, resolve_path
from fewstep.models.model_config import Size
from fewstep.samplers.generate import GeneratedSet
from fewstep.samplers.grids import given_steps
from fewstep.samplers.plan import SamplingConfig, plan, steps_within

DEFAULT_STEPS = (1, 2, 4)


def evaluate(
    source: Source,
    *,
    protocol: Protocol | None = None,
    locator: WeightsLocator | None = None,
    reference: str | None = None,
    steps: Sequence[int] = (),
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
    """Scores every combination of ``solver``, ``steps`` (by default as many as ``grid`` lists, or else 1, 2 and 4) and
    ``guidance`` (a teacher's times are spaced by ``grid``, see ``samplers.grids``).

    A ``protocol`` specifies what is measured, on how many samples of which seeds, and against what; ``locator`` finds
    the weights of its networks. Without one, ``n`` samples are compared with the test images of a ``reference``, by
    default the run's (``reference_for``). ``nfe`` replaces ``steps``: as many steps as fit into that number of
    evaluations. After each combination the scores are merged into ``json_file``, by default a run's ``eval.json``,
    which also takes over the known scores of its teacher. Raises ``UserError`` on a request that cannot be met, before
    anything is computed.
    """
    source = checkpoint_of(source) or source  # the same for all combinations, whatever a run writes meanwhile
    if protocol is None:
        reference = reference_for(source, reference)
    model, name = load(source, device), name or name_of(source)
    evaluator: ReferenceEvaluator | ProtocolEvaluator
    if protocol is None:
        evaluator = ReferenceEvaluator(load_reference(str(reference), "test", model.device, locator), n, (seed,))
    else:
        evaluator = _evaluator(protocol, locator, model.device)
    solvers = list(solver) or ["student" if model.config.few_step else "euler"]
    file = Path(json_file) if json_file else _default_json(Path(source))
    known = read_scores(file) if file and file.is_file() else known_teacher_scores(source, evaluator.hashes)
    steps = steps or ([listed] if (listed := given_steps(grid)) else DEFAULT_STEPS)
    requests = [
        SamplingConfig(rule, steps_within(rule, count, scale != 1, model.config) if nfe else count, scale, grid)
        for rule in solvers for count in nfe or steps for scale in guidance
    ]  # fmt: skip
    for request in requests:
        plan(model, request)
    evaluator.check(model)
    if file is not None:
        check_writable(file)
    scores: list[Score] = []
    identity = {"source": str(source), "source_sha256": model_sha256(model)}
    for request, own in product(dict.fromkeys(requests), evaluator.seeds):
        label = f"{request.solver} {request.steps} steps, guidance {request.guidance:g}"
        report = partial(progress, label) if progress else None
        found = evaluator(model, name, replace(request, seed=own), report)
        scores += [score.model_copy(update=identity) for score in found]
        if file is not None:  # as it is now: another evaluation may have written to it meanwhile
            write_scores(merge(read_scores(file) if file.is_file() else known, scores), file)
    return scores


def evaluate_images(
    source: Source, protocol: Protocol, locator: WeightsLocator | None = None, *, skip_bad: bool = False,
    device: str = "auto", json_file: Source | None = None, name: str | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> list[Score]:  # fmt: skip
    """Scores the images of a folder or an archive. With ``json_file``, features of an unfinished evaluation are kept in
    ``JSON_FILE.features`` beside it, and the same call continues it. ``progress(what, done)`` counts images. Raises
    ``UserError`` on images that cannot be scored, or some of which are the reference's."""
    protocol.check_source(Path(source))
    work = None
    if json_file is not None:
        file = Path(json_file)
        check_writable(file)
        if file.is_file():
            read_scores(file)  # a damaged file is refused before the work
        work = file.with_name(f"{file.name}.features")
    evaluator = _evaluator(protocol, locator, pick_device(device), skip_bad, work, progress)
    scores = evaluator.of_images(Path(source), name or Path(source).name)
    if json_file is not None:
        write_scores(merge(read_scores(file) if file.is_file() else [], scores), file)
    if work is not None:
        shutil.rmtree(work, ignore_errors=True)
    return scores


def _evaluator(
    protocol: Protocol, locator: WeightsLocator | None, device: torch.device, skip_bad: bool = False,
    work: Path | None = None, progress: Callable[[str, int], None] | None = None,
) -> ReferenceEvaluator | ProtocolEvaluator:  # fmt: skip
    if protocol.uses_bundled_reference:
        real = load_reference(str(protocol.reference), "test", device)
        return ReferenceEvaluator(real, protocol.n, protocol.seeds, protocol.name, skip_bad, progress)
    found = locator or WeightsLocator.from_environment()
    return ProtocolEvaluator(protocol, found, device, skip_bad, work=work, progress=progress)


def known_teacher_scores(source: Source, hashes: set[str]) -> list[Score]:
    """The scores of a run's teacher from the ``eval.json`` beside its weights (or of the run that it is from), as far
    as the features are the same."""
    run = run_of(source)
    teacher = teacher_of(run) if run is not None else None
    files = [Path(teacher) / "eval.json", resolve_path(teacher) / "eval.json"] if teacher is not None else []
    scores = next((read_scores(file) for file in files if file.is_file()), [])
    return [score for score in scores if score.features_sha256 in hashes]


def _default_json(source: Path) -> Path | None:
    """The file of a finished run, whose scores are not those of a checkpoint."""
    return source / "eval.json" if is_run(source) else None


def win_rates(
    ours: Source, theirs: Source, *, n: int = 2_000, captions: Source | None = None, size: Size | None = None,
    rewards: Sequence[str] = (), sampling: SamplingConfig | None = None, reference: str | None = None,
    batch: int | None = None, device: str = "auto",
) -> list[dict[str, Any]]:  # fmt: skip
    """How often ``ours`` has a higher reward than ``theirs`` on the same label (or caption) and noise, with Wilson's
    95 % interval, and both means, for each of ``rewards`` (default: all). The default seed is 1, other than that of
    ``make_preferences``.

    Models that take prompts need ``captions``, a text file with one per line or a table with a column caption, prompt
    or text, which are used in turn; of pipelines, ``size`` is that of the samples in pixels. ``batch`` samples are
    generated at a time, by default 8 of a pipeline and 100 of another model."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    sampling = sampling or SamplingConfig(seed=1)
    prompts = tuple(read_texts(Path(captions))) if captions is not None else ()
    registry: Registry[Any] = PROMPT_REWARDS if prompts else REWARDS
    chosen = {name: registry.resolve(name) for name in rewards or registry.names()}
    found: list[dict[str, Tensor]] = []
    shape: tuple[int, ...] | None = None
    labels: list[tuple[int, tuple[str, ...]]] = []
    for source in (ours, theirs):
        model = load(source, device, size)
        if shape not in (None, model.config.shape):
            made = f"{ours} generates {list(shape or ())}, {theirs} {list(model.config.shape)}"
            raise UserError(f"{made}: they cannot start from the same noise.")
        shape = model.config.shape
        if not model.config.takes_prompts:
            labels.append((model.config.classes, model.config.class_names or ()))
            if labels[0][0] != labels[-1][0] or (all(names for _, names in labels) and labels[0] != labels[-1]):
                raise UserError(f"The classes of {theirs} are not those of {ours}: samples of one label are compared.")
        network = classifier_for(ours, reference, model.device)
        found.append(_rewards(model, chosen, prompts, n, sampling, network, batch))
    results = []
    for name in chosen:
        a, b = (values[name] for values in found)
        share, low, high = win_rate(a, b)
        means = {"ours": a.mean().item(), "theirs": b.mean().item()}
        row = {"reward": name, "win_rate": share, "low": low, "high": high, **means, "n": n, "seed": sampling.seed}
        results.append(row)
    return results


def _rewards(
    model: Model, rewards: Mapping[str, Any], prompts: Sequence[str], n: int, sampling: SamplingConfig,
    network: ClassifierFeatures, batch: int | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Rewards [n] of samples of a model, by name."""
    shown: Tensor | list[str] = [prompts[k % len(prompts)] for k in range(n)] if prompts else model.labels(n)
    parts, done = [], 0
    for name, reward in rewards.items():
        rate(name, reward, network, noise_image(model), shown[:1])  # refused before sampling
    for images in GeneratedSet(model, sampling, n, prompts, batch).parts():
        some = shown[done : done + len(images)]
        parts.append({name: rate(name, reward, network, images, some) for name, reward in rewards.items()})
        done += len(images)
    return {name: torch.cat([part[name] for part in parts]) for name in rewards}
