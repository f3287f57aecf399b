"""Training: distil a teacher, or pretrain a network on data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from fewstep.api.models import Source
from fewstep.api.reference import training_reference
from fewstep.api.training_progress import TrainingProgress
from fewstep.core.errors import UserError
from fewstep.core.image_files import to_images
from fewstep.distill.agreement import require_same_inputs, require_same_settings
from fewstep.distill.build import build_inputs
from fewstep.distill.callback import Callback
from fewstep.distill.checkpoint import checkpoints
from fewstep.distill.config import Config
from fewstep.distill.config_files import load_config
from fewstep.distill.data import batch
from fewstep.distill.previews import Previews
from fewstep.distill.processes import join_world, naming_ended_processes
from fewstep.distill.run_folder import RunFolder, run_config
from fewstep.distill.stop_requests import signals_interrupt
from fewstep.eval.references import load_reference
from fewstep.eval.validation import PromptValidation, Validation
from fewstep.models.compilation import compiling
from fewstep.models.denoiser import Denoiser
from fewstep.models.loading import Model
from fewstep.samplers.plan import SamplingConfig


def train(
    config: Config | Source | None = None, *overrides: str, resume: Source | None = None,
    teacher: Model | Denoiser | None = None, data: batch.Source | None = None, callbacks: Sequence[Callback] = (),
    progress: bool = True,
) -> Path:  # fmt: skip
    """Distils a teacher (or, for a config with ``model:``, pretrains a network) and returns the run folder.

    ``overrides`` are ``"key=value"`` strings for a config file. ``resume`` continues the run in that folder with its
    own config, of which overrides may change what ``distill.resume.MAY_CHANGE`` lists. ``teacher`` and ``data`` are the
    user's own objects, instead of those that the config names. Progress is a bar on a terminal, and elsewhere (a batch
    job, a notebook) a line about every 30 seconds; ``progress=False`` prints nothing. Raises ``UserError`` on a mistake
    in the config and ``Interrupted`` after a signal or ``max_hours``. To train without a folder, use ``Trainer``.
    """
    if resume is not None:
        if config is not None:
            raise UserError("With resume the run's own config is used; give changes as key=value.")
        settings = run_config(resume, overrides)
    elif config is None:
        raise UserError("Give a config, or a run folder to resume.")
    elif isinstance(config, Config) and overrides:
        raise UserError(
            f"Overrides such as {overrides[0]!r} are for a config file; Config.model_copy(update=...) changes a Config."
        )
    else:
        settings = config if isinstance(config, Config) else load_config(config, overrides)
    run = train_run(settings, resume, teacher=teacher, data=data, callbacks=callbacks, progress=progress)
    return run.folder


def train_run(
    config: Config, resume: Source | None, *, teacher: Model | Denoiser | None = None,
    data: batch.Source | None = None, callbacks: Sequence[Callback] = (), progress: bool = True,
) -> RunFolder:  # fmt: skip
    """The same, returning the run with its trainer."""
    world, device = join_world(config.device)
    shown = TrainingProgress(config.steps, quiet=not progress or world.rank > 0)
    with signals_interrupt(), naming_ended_processes(world), shown, compiling():
        require_same_settings(world, config, resume is not None)
        resumed = world.once(lambda: resume is not None and bool(checkpoints(Path(resume) / "checkpoints")))
        with world.together():
            if resume is not None and not resumed and (Path(resume) / "student").exists():
                raise UserError(
                    f"{resume} has a student but no checkpoint to continue from: training would begin again and "
                    "replace it. Train in another folder with out=FOLDER, or move student away."
                )
            inputs = build_inputs(config, device, teacher, data, world, resumed=resumed)
            previews = Previews.create(config, inputs)
        if resume:
            run = RunFolder.reopen(resume, device, world, inputs, config=config)
        else:
            run = RunFolder.create(config, device, world, inputs)
        require_same_inputs(run.trainer)
        with TemporaryDirectory() as temporary:
            with world.together():  # only the first process writes images to the run
                folder = run.folder if world.rank == 0 else Path(temporary)
                validation = _validation(config, run, folder) if config.validation.every else None
            if run.trainer.step < config.steps:
                tried = {"the health check": config.health.every, "validation": config.validation.every}
                if due := [name for name, every in tried.items() if every]:
                    shown.before_training(f"trying {' and '.join(due)}")
                run.trainer.rehearse(validation and validation.small(Path(temporary)))
                if previews is not None:
                    shown.before_training("sampling the teacher's previews")
                    previews.render(run.trainer)
            run.train(validation, [shown, *([previews] if previews is not None else []), *callbacks])
    return run


def _validation(config: Config, run: RunFolder, folder: Path) -> Validation | PromptValidation:
    """What scores the student, or only shows its images: of a pipeline, and of words for which no reference is known.
    Raises ``UserError`` if there is no reference for a student that takes no prompts."""
    settings, inputs = config.validation, run.trainer.inputs
    sampling = SamplingConfig(settings.solver, settings.steps, settings.guidance)
    if (pipeline := inputs.pipeline) is not None:
        assert inputs.prompts is not None

        def decode(x0: Tensor) -> Tensor:
            return pipeline.decode_images(pipeline.decoder(), x0)

        return PromptValidation(sampling, settings.images, decode, inputs.prompts, folder)
    named = training_reference(settings.reference, config.teacher)
    if named is None and inputs.prompts is not None:
        return PromptValidation(sampling, settings.images, to_images, inputs.prompts, folder)
    if named is None:
        raise UserError(
            "validation.every needs a reference, by which students are scored: set validation.reference to a folder "
            "that fewstep data reference makes from images, or validation.every=0 to train without scores."
        )
    reference = load_reference(named, "train", run.trainer.device)
    reference.require_fit(inputs.model_config)
    return Validation(sampling, settings.n, reference, folder)
