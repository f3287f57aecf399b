"""Builds the inputs of training (roles, data sources, model config) from a config or from your own objects."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fewstep.core.errors import UserError
from fewstep.core.image_data import KINDS as IMAGE_KINDS
from fewstep.core.image_data import open_images, required_captions
from fewstep.core.keyed_random import KeyedRandom
from fewstep.core.registry import dotted_name
from fewstep.core.tables import read_texts
from fewstep.distill import sharding
from fewstep.distill import stage_checks as checks
from fewstep.distill.config import DATA_KINDS, Config, DataConfig
from fewstep.distill.data.batch import SOURCES, Source
from fewstep.distill.data.emoji import CAPTIONS, Emoji
from fewstep.distill.data.sources import Images, Labels, Prompts, Stored, Words
from fewstep.distill.data.stored_files import read_stored
from fewstep.distill.networks import load_networks, start_from
from fewstep.distill.processes import SINGLE_PROCESS, World
from fewstep.distill.roles import Role
from fewstep.models.adapters import checkpoint_gradients, share_network
from fewstep.models.attention import set_attention
from fewstep.models.condition import LabelRows
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import Model, load_model, pipeline_of
from fewstep.models.model_config import ModelConfig
from fewstep.models.quantized import quantize
from fewstep.models.schedules import schedule_to_dict
from fewstep.models.vocabulary import Vocabulary, WordPrompts
from fewstep.models.weights_hash import weights_hash

DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16, "nf4": torch.bfloat16,
}  # of the weights; with quantized linear layers, of all others  # fmt: skip


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of training. ``roles`` holds the teacher, or the new network as ``model``; ``model_config`` belongs to
    that network. ``networks`` are others, on the host, from which roles start. ``prompts`` belong to a model that takes
    prompts, ``pipeline`` to one that encodes them by a pipeline; ``teacher_sha256`` is the hash of the teacher's
    weights. ``notes`` are for the log."""

    roles: Mapping[str, Role]
    sources: Mapping[str, Source]
    model_config: ModelConfig
    prompts: EncodedPrompts | WordPrompts | None = None
    pipeline: PipelineFolder | None = None
    teacher_sha256: str | None = None
    networks: Mapping[str, Model] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def networks_sha256(self) -> dict[str, str]:
        """The hashes of the weights of ``networks``."""
        return {name: weights_hash(model.denoiser) for name, model in self.networks.items()}


def build_inputs(
    config: Config,
    device: torch.device,
    teacher: Model | Denoiser | None = None,
    data: Source | None = None,
    world: World = SINGLE_PROCESS,
    *,
    resumed: bool = False,
) -> TrainingInputs:
    """Loads the teacher (or creates the new network), which ``shard`` splits over the processes of ``world``, and opens
    the data. ``teacher`` and ``data`` replace those of the config. ``resumed``: the weights of roles come from a
    checkpoint, so that ``model_weights`` is not read. Raises ``UserError`` if an input is missing or damaged, or if
    they do not fit together."""
    checks.require_gpu(config, device)
    features = tuple(dict.fromkeys(path for stage in config.stages for path in stage.objective.teacher_features))
    if data is None and config.data.kind not in DATA_KINDS:
        data = _custom_source(config.data)
    if teacher is None and config.model is not None:
        return _pretraining(config, config.model, device, data, world, resumed)
    if teacher is not None:
        _check_own_teacher(config)
        model = _own_model(teacher, data)
        model.denoiser.record_features(features)
    elif config.teacher is not None:
        model = load_model(config.teacher, features, config.size, DTYPES[config.weights])
        checks.require_bfloat16(config, model.denoiser)
    else:
        raise UserError("The config has neither teacher (to distil) nor model (to pretrain); give one of them.")
    encoded = config.data.kind == "prompts" and data is None and model.config.vocabulary is None
    pipeline = pipeline_of(model) if encoded else None
    networks, notes = load_networks(config, model)
    backbone, model_config = model.denoiser.backbone, model.config
    for network in (backbone, *(other.denoiser.backbone for other in networks.values())):
        set_attention(network, config.attention, device, DTYPES[config.precision])
    if config.weights in ("int8", "nf4"):
        quantize(backbone, config.weights)
    if config.adapters is not None:
        lora = share_network(model.denoiser, **dict(config.adapters))
        model_config = model_config.model_copy(update={"base": config.teacher, "lora": lora})
    if config.gradient_checkpointing:
        for each in (model, *networks.values()):
            checkpoint_gradients(each.denoiser.backbone)
    teacher_sha256 = weights_hash(model.denoiser)
    roles = {"teacher": Role(placed(model.denoiser, config, device, world))}
    notes = [*checks.settings_without_effect(config, device, world.size), *notes]
    prompts = _prompts(config.data, pipeline, model_config) if pipeline is not None else None
    source = data or _source(config, model_config, prompts, pipeline, device)
    if pipeline is None:
        _check_shape(source, model_config)
    shown = prompts if prompts is not None else _word_prompts(source)
    return TrainingInputs(roles, {"data": source}, model_config, shown, pipeline, teacher_sha256, networks, notes)


def placed(denoiser: Denoiser, config: Config, device: torch.device, world: World) -> Denoiser:
    """The denoiser on its device, or split over the processes, layer by layer: a device may not hold it whole."""
    if config.shard and world.mesh is not None:
        sharding.split(denoiser, world.mesh)
    return denoiser.to(device)


def _pretraining(
    config: Config, model_config: ModelConfig, device: torch.device, data: Source | None, world: World, resumed: bool
) -> TrainingInputs:
    with torch.random.fork_rng():  # torch's initialisers use the global generator
        torch.manual_seed(config.seed)
        denoiser = model_config.build()
    read = config.model_weights if not resumed else None
    notes = checks.settings_without_effect(config, device, world.size)
    notes += [start_from(read, denoiser, model_config)] if read is not None else []
    set_attention(denoiser.backbone, config.attention, device, DTYPES[config.precision])
    if config.gradient_checkpointing:
        checkpoint_gradients(denoiser.backbone)
    roles = {"model": Role(placed(denoiser, config, device, world))}
    source = data or _source(config, model_config, None, None, device)
    _check_shape(source, model_config)
    if isinstance(source, Images) and model_config.classes and source.table.class_names:
        names = model_config.class_names or source.table.class_names
        model_config = model_config.model_copy(update={"class_names": names})
    return TrainingInputs(roles, {"data": source}, model_config, _word_prompts(source), notes=notes)


# --- your own objects -------------------------------------------------------------------------------------------------


def _custom_source(data: DataConfig) -> Source:
    make = SOURCES.resolve(data.kind)
    try:
        source: Source = make(**data.options)
    except TypeError as error:
        raise UserError(f"data.options do not fit {data.kind!r}: {error}.") from error
    return source


def _check_own_teacher(config: Config) -> None:
    if config.teacher is not None or config.model is not None:
        given = "teacher" if config.teacher is not None else "model"
        raise UserError(f"The config names a {given}, and teacher=... is given as well: give one of them.")
    if config.adapters is not None:
        raise UserError(
            "Adapters are saved without the network they belong to, which must therefore have a name: register your "
            'teacher with @fewstep.register("teacher", NAME) and set teacher: NAME, or train copies (adapters: null).'
        )


def _own_model(teacher: Model | Denoiser, data: Source | None) -> Model:
    """A copy of a teacher, in eval mode and trainable, with its config; for a bare denoiser, the config is derived from
    it and from a batch of ``data``."""
    teacher = copy.deepcopy(teacher)  # never changes the user's object
    denoiser = teacher.denoiser if isinstance(teacher, Model) else teacher
    denoiser.eval().requires_grad_(True)
    if isinstance(teacher, Model):
        return teacher
    if data is None:
        raise UserError("A teacher that is a Denoiser needs data=SOURCE, which defines the shape of a sample.")
    batch = data(KeyedRandom(0, 0, "probe", 0), 1)
    labels = batch.condition.nulls.get("labels")
    config = ModelConfig(
        backbone={"name": dotted_name(type(teacher.backbone))},
        noise_schedule=schedule_to_dict(teacher.schedule),
        prediction=teacher.kind,
        shape=batch.shape,
        classes=0 if labels is None else int(labels),
    )
    return Model(denoiser=teacher, config=config)


def _check_shape(source: Source, model: ModelConfig) -> None:
    """Raises ``UserError`` unless a batch of ``source`` has the shape of the network's samples."""
    batch = source(KeyedRandom(0, 0, "probe", 0), 1)
    shapes = {"its samples": batch.shape, **{name: tuple(t.shape[1:]) for name, t in batch.items() if name == "x0"}}
    for what, shape in shapes.items():
        if tuple(shape) != tuple(model.shape):
            raise UserError(
                f"The data does not fit the network: {what} are {list(shape)}, the network is for {list(model.shape)}."
            )


# --- data -------------------------------------------------------------------------------------------------------------


def _prompts(data: DataConfig, pipeline: PipelineFolder, model: ModelConfig) -> EncodedPrompts:
    assert data.path is not None
    prompts = EncodedPrompts(Path(data.path))
    prompts.check(pipeline, model.shape)
    return prompts


def _source(
    config: Config, model: ModelConfig, prompts: EncodedPrompts | None, pipeline: PipelineFolder | None,
    device: torch.device,
) -> Source:  # fmt: skip
    data = config.data
    if data.kind in CAPTIONS:
        return Emoji.create(
            data.kind, model, device, repeat=data.repeat,
            images=any("x0" in stage.objective.tensors for stage in config.stages),
        )  # fmt: skip
    if model.vocabulary is not None:
        return _word_source(data, model, model.vocabulary)
    if data.kind != "prompts" and model.takes_prompts:
        raise UserError(
            "This teacher needs prompts: set data.kind=prompts, and data.path to a folder from fewstep data encode or "
            "fewstep data preferences."
        )
    if data.kind == "labels":
        return Labels(model.classes, model.shape)
    if prompts is not None and pipeline is not None:
        sizes = [pipeline.family.shape(*size) for size in data.sizes]
        return Prompts(prompts, sizes or [model.shape])
    assert data.path is not None
    if data.kind in IMAGE_KINDS:
        if data.columns.caption is not None:
            raise UserError(
                "data.columns.caption does not act: this model takes no captions. One with a vocabulary does "
                "(model.vocabulary), and a pipeline, for which fewstep data encode encodes them (data.kind=prompts)."
            )
        table = open_images(data.images, model.shape)
        labels = table.labels_of(model.classes, model.class_names or ()) if model.classes else table.labels
        return Images(table, LabelRows(labels, model.classes), data.flip)
    if data.kind == "tensors":
        return read_stored(Path(data.path), model.classes)
    raise UserError(f"data.kind: {data.kind} needs a teacher that is a diffusers pipeline.")


def _word_source(data: DataConfig, model: ModelConfig, vocabulary: Vocabulary) -> Source:
    """A source for a model that takes words: captions alone, with images, or of stored samples."""
    if data.kind == "prompts":
        if data.sizes:
            raise UserError(
                "data.sizes does not act: they are for pipelines, and this model has one size. Leave it out."
            )
        return Words(vocabulary.encode(read_texts(Path(str(data.path)))), model.shape)
    if data.kind == "tensors":
        return read_stored(Path(str(data.path)), 0, vocabulary)
    if data.kind in IMAGE_KINDS:
        if data.columns.label is not None:
            raise UserError("data.columns.label does not act: this model takes words, from data.columns.caption.")
        table = open_images(data.images, model.shape)
        return Images(table, vocabulary.encode(required_captions(table.rows)), data.flip)
    raise UserError(
        f"This model takes words, which data.kind={data.kind} does not have: set data.kind=prompts and data.path to a "
        "file of captions (.txt, .csv, .jsonl, .parquet), for images with captions data.kind=dataset or folder, or for "
        "the bundled ones data.kind=emoji (clips: emoji_clips)."
    )


def _word_prompts(source: Source) -> WordPrompts | None:
    """The prompts of a source of words; None for another one."""
    if isinstance(source, Emoji | Words):
        return source.prompts
    if isinstance(source, Images | Stored) and isinstance(source.conditions, WordPrompts):
        return source.conditions
    return None
