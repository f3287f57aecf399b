"""Other networks than the teacher's, from which roles start: smaller students and fake scores, other checkpoints.

A new network has the teacher's settings but for those that ``networks.NAME.backbone`` changes. Tensors that the teacher
has under the same name and in the same shape are copied from it, and the others are initialised with the run's seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fewstep.core.errors import UserError
from fewstep.core.json_files import read_json_object
from fewstep.distill.config import Config, NetworkConfig
from fewstep.models.adapters import AdapterView
from fewstep.models.denoiser import Denoiser
from fewstep.models.hub.encoded import fingerprint
from fewstep.models.hub.family import HubBackbone
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import Model, bases_of, load_model, pipeline_of, resolve_path
from fewstep.models.model_config import ModelConfig, with_settings

OF_WEIGHTS = dict.fromkeys(
    ("base", "base_sha256", "lora", "few_step", "boundaries", "expert_backbones", "precision", "base_weights")
)
WORDS = "words.weight"  # one row per word of the vocabulary, after that of no word
LATENT_SPACE = ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean", "latents_std")


def load_networks(config: Config, teacher: Model) -> tuple[dict[str, Model], list[str]]:
    """The networks of a config by name, float32 and on the CPU, and notes on what was copied from the teacher.

    Raises ``UserError`` if one cannot be loaded or built, or if its samples or conditions are not the teacher's.
    """
    found: dict[str, Model] = {}
    notes: list[str] = []
    for name, settings in config.networks.items():
        try:
            if settings.checkpoint is not None:
                found[name] = _checkpoint(settings.checkpoint, teacher)
            else:
                found[name], note = _new(settings, teacher, config.seed)
                notes.append(f"networks.{name}: {note}")
            _require_fit(found[name], teacher)
        except UserError as error:
            raise UserError(f"networks.{name}: {error}") from error
    return found, notes


def is_network_folder(source: str | Path) -> bool:
    """Whether a folder holds a denoiser alone, as diffusers saves it."""
    file = resolve_path(source) / "config.json"
    return file.is_file() and "_class_name" in read_json_object(file) and not file.with_name("fewstep.json").is_file()


# --- new networks -----------------------------------------------------------------------------------------------------


def _new(settings: NetworkConfig, teacher: Model, seed: int) -> tuple[Model, str]:
    assert settings.backbone is not None
    changed, origin = settings.backbone, teacher.config
    with torch.random.fork_rng():  # initialisers use the global generator
        torch.manual_seed(seed)
        if _of_pipeline(origin):
            denoiser, model_config = _new_of_pipeline(changed, teacher)
        else:
            backbone = with_settings(origin.backbone, changed)
            model_config = origin.model_copy(update={**OF_WEIGHTS, "backbone": backbone})
            denoiser = model_config.build()
    theirs = teacher.denoiser.backbone
    if isinstance(theirs, AdapterView):
        theirs = theirs.merged()
    copied, number = copy_matching(denoiser.backbone, theirs)
    note = f"{copied} of {number} tensors were copied from the teacher, the others initialised with the seed {seed}."
    return Model(denoiser=denoiser, config=model_config), note


def _new_of_pipeline(changed: Mapping[str, Any], teacher: Model) -> tuple[Denoiser, ModelConfig]:
    if "name" in changed:
        raise UserError(
            f"backbone.name = {changed['name']!r}: a student of a diffusers pipeline has a network of its class; leave "
            "name out, and change the settings of that class."
        )
    folder = _one_denoiser(pipeline_of(teacher))
    folder.require_settings(changed)
    before = teacher.config.backbone.get("network", folder.network_settings(folder.path / folder.family.part))
    settings = {**before, **changed}
    update = {
        **OF_WEIGHTS,
        "backbone": {"name": "diffusers", "network": settings},
        "base": bases_of(teacher.config)[-1],
    }
    own = teacher.denoiser
    return folder.build(settings, own.schedule, own.kind), teacher.config.model_copy(update=update)


@torch.no_grad()
def copy_matching(network: nn.Module, origin: nn.Module) -> tuple[int, int]:
    """Copies the tensors of ``origin`` that ``network`` has under the same name and in the same shape; returns their
    number and that of all tensors of ``network``."""
    ours, theirs = network.state_dict(), origin.state_dict()
    same = [name for name, tensor in ours.items() if name in theirs and theirs[name].shape == tensor.shape]
    for name in same:
        ours[name].copy_(theirs[name])
    return len(same), len(ours)


@torch.no_grad()
def start_from(source: str, denoiser: Denoiser, config: ModelConfig) -> str:
    """Copies into a new network what it shares with the saved model ``source``: the tensors of equal name, and the
    vectors of the words that both vocabularies have. Returns a note on what was taken.

    Raises ``UserError`` if ``source`` cannot be loaded, if a tensor has another shape in it, or if nothing is shared.
    """
    try:
        origin = load_model(source, dtype=torch.float32)
    except UserError as error:
        raise UserError(f"model_weights: {error}") from error
    network = origin.denoiser.backbone
    ours = denoiser.backbone.state_dict()
    theirs = dict((network.merged() if isinstance(network, AdapterView) else network).state_dict())
    same, words = [name for name in ours if name in theirs], ""
    if config.vocabulary is not None and origin.config.vocabulary is not None and WORDS in same:
        known, rows = config.vocabulary.shared_words(origin.config.vocabulary)
        if ours[WORDS].shape[1:] == theirs[WORDS].shape[1:]:  # else refused below
            theirs[WORDS] = ours[WORDS].index_copy(0, torch.tensor(known), theirs[WORDS][rows])
        words = f" (words: {len(known)} of {len(config.vocabulary.words)})"
    for name in same:
        if ours[name].shape != theirs[name].shape:
            raise UserError(
                f"model_weights: {name} has the shape {list(theirs[name].shape)} in {source}, and "
                f"{list(ours[name].shape)} in this model. Give the model the settings of that one, or leave "
                "model_weights out."
            )
    for name in same:
        ours[name].copy_(theirs[name])
    if not same:
        raise UserError(f"model_weights: no tensor of {source} has a name of this model's. Leave model_weights out.")
    return f"{len(same)} of {len(ours)} tensors{words} were taken from {source}, the others are new."


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _checkpoint(source: str, teacher: Model) -> Model:
    if is_network_folder(source):
        return _of_network_folder(resolve_path(source), teacher)
    model = load_model(source, dtype=torch.float32)
    config, denoiser = model.config, model.denoiser
    if isinstance(denoiser.backbone, AdapterView):
        network = denoiser.backbone.merged()
        denoiser = Denoiser(network, denoiser.schedule, denoiser.kind, style=denoiser.style)
        config = config.model_copy(update={"lora": None, "base_sha256": None, "base_weights": None})
        if not _of_pipeline(config):
            config = config.model_copy(update={"base": None})
    if _of_pipeline(config):  # at any size, like its pipeline
        config = config.model_copy(update={"shape": teacher.config.shape})
    denoiser.eval().requires_grad_(True)
    return Model(denoiser=denoiser, config=config, path=model.path)


def _of_network_folder(path: Path, teacher: Model) -> Model:
    if not _of_pipeline(teacher.config):
        raise UserError(f"{path} is a network of diffusers, and the teacher is not a diffusers pipeline.")
    folder = _one_denoiser(pipeline_of(teacher))
    found, wanted = read_json_object(path / "config.json")["_class_name"], folder.network_class.__name__
    if found != wanted:
        raise UserError(f"{path} holds a {found}, the teacher's pipeline needs a {wanted}.")
    denoiser = folder.denoiser(torch.float32, weights=path)
    backbone = {"name": "diffusers", "network": folder.network_settings(path)}
    update = {**OF_WEIGHTS, "backbone": backbone, "base": bases_of(teacher.config)[-1]}
    own = Denoiser(denoiser.backbone, teacher.denoiser.schedule, teacher.denoiser.kind, style=denoiser.style).eval()
    return Model(denoiser=own, config=teacher.config.model_copy(update=update), path=path)


def _one_denoiser(folder: PipelineFolder) -> PipelineFolder:
    if len(folder.parts) > 1:
        raise UserError(
            f"the pipeline {folder.path} has two denoisers, of which a network of another architecture is not made; "
            "leave networks away, and let the roles start from the teacher."
        )
    return folder


# --- what must be equal -----------------------------------------------------------------------------------------------


def _require_fit(network: Model, teacher: Model) -> None:
    """Raises ``UserError`` unless a network takes the teacher's noisy samples and conditions."""
    ours, theirs = network.config, teacher.config
    if ours.boundaries:
        raise UserError("it has several experts by noise level, and a role starts from one network.")
    _equal("condition", _condition(ours), _condition(theirs))
    if _of_pipeline(theirs):
        _require_one_pipeline(network, teacher)
    if ours.vocabulary != theirs.vocabulary:
        raise UserError("its vocabulary is not the teacher's: both must have the same words in the same order.")
    _equal("shape", list(ours.shape), list(theirs.shape))
    _equal("number of classes", ours.classes, theirs.classes)
    if ours.class_names and theirs.class_names:
        _equal("class_names", list(ours.class_names), list(theirs.class_names))


def _condition(config: ModelConfig) -> str:
    if config.vocabulary is not None:
        return "words of a vocabulary"
    return "prompts" if config.takes_prompts else "class labels" if config.classes else "none"


def _of_pipeline(config: ModelConfig) -> bool:
    return config.takes_prompts and config.vocabulary is None


def _require_one_pipeline(network: Model, teacher: Model) -> None:
    """The same for networks of pipelines: one family, latent space, condition, and text encoders."""
    backbone, theirs = network.denoiser.backbone, pipeline_of(teacher)
    assert isinstance(backbone, HubBackbone)
    family, wanted, encoders = backbone.family, theirs.family, (fingerprint(pipeline_of(network)), fingerprint(theirs))
    _equal("family", type(family).__name__, type(wanted).__name__)
    _equal("latent shape", list(family.shape(*wanted.default_size)), list(wanted.shape(*wanted.default_size)))
    for key in LATENT_SPACE:
        _equal(f"{key} of the VAE", family.vae.get(key), wanted.vae.get(key))
    _equal("shapes of conditions", dict(family.condition_shapes), dict(wanted.condition_shapes))
    if all(encoders) and encoders[0] != encoders[1]:
        raise UserError("its text encoders have other files than the teacher's, whose prompts it would get.")


def _equal(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise UserError(f"its {what}: {ours}, the teacher's: {theirs}. They must be equal.")
