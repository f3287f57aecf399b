"""The configuration of a run: one typed YAML file. Unknown keys and wrong values are errors that name them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from fewstep.core.errors import UserError, nearest
from fewstep.core.image_data import KINDS as IMAGE_KINDS
from fewstep.core.image_data import ImageData
from fewstep.core.image_rows import Columns
from fewstep.core.paths import MaybePath
from fewstep.core.registry import is_dotted
from fewstep.distill.data.batch import SOURCES
from fewstep.distill.data.emoji import CAPTIONS
from fewstep.distill.objectives import OBJECTIVES
from fewstep.distill.stage import (
    MAX_COUNT,
    MAX_GUIDANCE,
    MAX_STEPS,
    MAX_WEIGHT,
    BaseConfig,
    ObjectiveConfig,
    RoleConfig,
)
from fewstep.distill.trackers import check_names
from fewstep.models.attention import Backend
from fewstep.models.model_config import ModelConfig

OF_IMAGES = ("subset", "split", "columns", "crop", "flip")
Pixels = Annotated[int, Field(ge=1, le=65_536)]
DATA_KINDS = ("labels", *IMAGE_KINDS, "tensors", "prompts", *CAPTIONS)


class DataConfig(BaseConfig):
    """The data source. ``kind`` is one of

    ``labels``: uniform class labels (of an unconditional model: nothing), no data. ``folder``: images, one subfolder
    per class; for a model with a vocabulary each with a caption beside it (``a.png``, ``a.txt``). ``idx``: a folder of
    idx files, of which ``split`` is ``train`` or ``test``. ``npz``: an .npz file of arrays. ``dataset``: a table (.csv,
    .jsonl) of image files, a folder with a ``metadata.csv``, or what Hugging Face's ``datasets`` reads: Parquet,
    WebDataset, a name on the hub with its ``subset`` and ``split``. ``tensors``: a safetensors file of samples with
    labels or captions (``fewstep data ode-pairs``, ``fewstep data preferences``, or the real images of a reference).
    ``prompts``: a folder from ``fewstep data encode`` or ``fewstep data preferences`` of a pipeline, with prompts
    alone, with images, or with preference pairs; for a model with a vocabulary a file of captions (.txt, .csv, .jsonl,
    .parquet). ``emoji``, ``emoji_clips``: captions of emoji for a model with a vocabulary, and images or clips rendered
    for them where the objective needs these. Any other name is your own source, created with ``options``.

    Of images, ``columns`` names the columns or arrays ``image`` and ``label``, or ``caption`` for a model with a
    vocabulary, if they have unusual names; with
    ``crop``, those of another size than the model's are scaled until they cover it and cropped around their centre
    (otherwise they are an error); with ``flip``, each is mirrored with probability 1/2 whenever it is sampled. For
    prompts alone, ``sizes`` lists height, width and frames in pixels, and each batch has one of them (by default the
    run's ``size``). ``repeat`` makes captions of emoji more frequent in training, for example those of a motion that
    is hard to learn: with ``{spinning: 8}`` each caption with the word "spinning" is sampled 8 times as often as one
    without; if a caption has several of the words, the largest number counts.
    """

    kind: str = "labels"
    path: MaybePath | None = None
    subset: str | None = None
    split: str = "train"
    columns: Columns = Columns()
    crop: bool = False
    flip: bool = False
    sizes: tuple[tuple[Pixels, Pixels, Pixels], ...] = ()
    repeat: dict[str, Annotated[int, Field(ge=1, le=100)]] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kind not in DATA_KINDS and self.kind not in SOURCES.names() and not is_dotted(self.kind):
            raise ValueError(f"unknown kind{nearest(self.kind, [*DATA_KINDS, *SOURCES.names()])}")
        if self.kind in DATA_KINDS and self.kind not in ("labels", *CAPTIONS) and self.path is None:
            raise ValueError(f"kind {self.kind} needs a path")
        if self.kind in CAPTIONS and self.path is not None:
            raise ValueError(f"kind {self.kind} ships with the package: leave path out")
        if self.path is not None and self.kind == "labels":
            raise ValueError(f"kind labels needs no data: leave path out, or set the kind of {self.path}")
        if self.path is not None and self.kind not in DATA_KINDS:
            raise ValueError(f"path does not reach a source of your own, {self.kind}: give it in options")
        if self.sizes and self.kind != "prompts":
            raise ValueError(f"sizes are for kind prompts, not {self.kind}")
        if self.repeat and self.kind not in CAPTIONS:
            raise ValueError(f"repeat is for captions of emoji ({', '.join(CAPTIONS)}), not for kind {self.kind}")
        if self.options and self.kind in DATA_KINDS:
            raise ValueError(f"options are for your own sources, not for kind {self.kind}")
        if self.kind in IMAGE_KINDS:
            self._check_images()
        elif given := [name for name in OF_IMAGES if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"{given[0]} is for images ({', '.join(IMAGE_KINDS)}), not for kind {self.kind}")
        return self

    def _check_images(self) -> None:
        try:
            self.images  # noqa: B018, its own checks
        except UserError as error:
            raise ValueError(str(error).removesuffix(".")) from error

    @property
    def images(self) -> ImageData:
        """The set of images, for the kinds that are images."""
        assert self.path is not None
        return ImageData(self.kind, self.path, self.split, self.subset, self.columns, self.crop)


class CheckpointConfig(BaseConfig):
    """A checkpoint is written every ``every`` steps, when the last one is ``minutes`` old, at the end and on Ctrl-C;
    the last ``keep`` stay."""

    every: int = Field(500, ge=1, le=MAX_STEPS)
    minutes: float | None = Field(None, gt=0, le=100_000)
    keep: int = Field(2, ge=1, le=MAX_COUNT)


class ValidationConfig(BaseConfig):
    """Every ``every`` steps (0: never) ``n`` samples of the averaged student are scored against the *training*-image
    statistics of ``reference`` (a folder of ``fewstep data reference``; by default that of the teacher's run, or of a
    bundled teacher), and the best student so far is saved. They are generated with ``solver`` (``student``:
    the student's own few-step rule), ``steps`` and ``guidance``. A model of words is scored on the captions of a
    reference of emoji. A pipeline's student is not scored, nor one of words without a reference: it generates
    ``images`` for prompts spread over all."""

    every: int = Field(0, ge=0, le=MAX_STEPS)
    n: int = Field(1000, ge=10, le=MAX_COUNT)
    reference: MaybePath | None = None
    solver: str = "student"
    steps: int | None = Field(None, ge=1, le=MAX_COUNT)
    guidance: float = Field(1.0, ge=0, le=MAX_GUIDANCE)
    images: int = Field(4, ge=1, le=MAX_COUNT)


class HealthConfig(BaseConfig):
    """Every ``every`` steps (0: never) the averaged student generates ``seeds`` samples for each of ``conditions``
    conditions. They are compared with the teacher's: ``teacher_steps`` Heun steps with the objective's guidance."""

    every: int = Field(50, ge=0, le=MAX_STEPS)
    conditions: int = Field(8, ge=1, le=MAX_COUNT)
    seeds: int = Field(8, ge=2, le=MAX_COUNT)
    teacher_steps: int = Field(16, ge=1, le=MAX_COUNT)


class PreviewConfig(BaseConfig):
    """Every ``every`` steps (0: never; by default with each validation) ``n`` samples of the averaged student are shown
    below the teacher's from the same noise, for conditions spread over all: of ``health.teacher_steps`` Heun steps with
    the objective's guidance. Of videos the first, middle and last frame are shown."""

    every: int | None = Field(None, ge=0, le=MAX_STEPS)
    n: int = Field(8, ge=1, le=1000)


class StageConfig(BaseConfig):
    """One stage: its steps, its objective, the roles that it trains, frozen copies (``freeze`` maps new name to role),
    and the maximum gradient norm ``clip``."""

    steps: int = Field(ge=1, le=MAX_STEPS)
    objective: SerializeAsAny[ObjectiveConfig]
    roles: dict[str, RoleConfig]
    freeze: dict[str, str] = Field(default_factory=dict)
    clip: float | None = Field(1.0, gt=0, le=MAX_WEIGHT)

    @property
    def starts(self) -> set[str]:
        """The roles and networks that this stage's roles and frozen copies start from."""
        return {role.init for role in self.roles.values()}.union(self.freeze.values())

    @field_validator("objective", mode="before")
    @classmethod
    def _of_its_own_class(cls, value: Any) -> Any:
        """A name, or settings with a ``name``, become the objective of that name."""
        settings = {"name": value} if isinstance(value, str) else value
        if not isinstance(settings, dict):
            return settings
        return OBJECTIVES.resolve(str(settings.get("name", ""))).model_validate(settings)


class AdapterConfig(BaseConfig):
    """Trains roles as LoRA adapters on the teacher's frozen network instead of as copies of it. ``alpha`` defaults to
    the rank (a scale of 1, which every loader applies correctly), ``targets`` to the layers that the family adapts."""

    rank: int = Field(64, ge=1, le=65_536)
    alpha: float | None = Field(None, gt=0, le=65_536)
    targets: tuple[str, ...] | None = None


class NetworkConfig(BaseConfig):
    """Another network than the teacher's, from which roles start (``init: NAME``): the saved model ``checkpoint`` (a
    run, a model folder, a bundled name; beside a pipeline also a pipeline, or a denoiser's folder as diffusers saves
    it), or a new one with the teacher's settings but for those in ``backbone``. Samples and conditions must be the
    teacher's. Of a new network, tensors with the name and shape of one of the teacher's are copied."""

    checkpoint: MaybePath | None = None
    backbone: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.checkpoint is None) == (self.backbone is None):
            raise ValueError("give either checkpoint (a saved model) or backbone (a new network's settings)")
        return self


class Config(BaseConfig):
    """A run. Give either ``teacher`` (a folder, a bundled name, or a diffusers pipeline by folder or hub id) or
    ``model`` (a new network). ``model_weights`` is a saved model (a run, a folder, a bundled name) from which a new
    network takes the tensors that it has under the same names, whose shapes must agree, and the vectors of the words
    that both know: a network for videos can start from one for images. A resumed run does not read it again.
    ``networks`` are others, by name, from which roles start: a smaller student, say.

    For pipelines: ``size`` is height, width and frames in pixels; ``weights`` is the type of the teacher's weights
    (with adapters also ``int8`` or ``nf4`` for linear layers); trained weights are float32, and all networks compute in
    ``precision``; ``gradient_checkpointing`` saves memory.
    ``compile`` saves time: blocks of networks are compiled on their first evaluations, which takes minutes.
    ``cuda_graphs`` saves the time of starting kernels one by one, which small networks on a GPU wait for, and takes
    memory.
    ``offload`` keeps frozen copies in host memory between their evaluations. ``shard`` splits every copied network, and
    the network that adapters share, over the processes.

    An update averages ``accumulate`` micro-batches of ``batch`` samples each. Several processes share them equally, so
    a run is the same run on any number of processes. After ``max_hours`` of training the run writes a checkpoint and
    stops, as after a signal.

    ``trackers`` receive the numbers and previews of the run: ``tensorboard``, ``wandb``, or another that accelerate
    knows.
    """

    out: MaybePath | None = None
    teacher: MaybePath | None = None
    size: tuple[Pixels, Pixels, Pixels] | None = None
    weights: Literal["float32", "bfloat16", "int8", "nf4"] = "float32"
    adapters: AdapterConfig | None = None
    attention: Backend = "sdpa"
    gradient_checkpointing: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    offload: bool = False
    shard: bool = False
    model: ModelConfig | None = None
    model_weights: MaybePath | None = None
    networks: dict[str, NetworkConfig] = Field(default_factory=dict)
    data: DataConfig = DataConfig()
    batch: int = Field(64, ge=1, le=MAX_COUNT)
    accumulate: int = Field(1, ge=1, le=MAX_COUNT)
    seed: int = Field(0, ge=0, lt=2**63)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["float32", "bfloat16"] = "float32"
    max_hours: float | None = Field(None, gt=0, le=MAX_STEPS)
    log_every: int = Field(10, ge=1, le=MAX_STEPS)
    trackers: tuple[str, ...] = ()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    health: HealthConfig = HealthConfig()
    previews: PreviewConfig = PreviewConfig()
    stages: tuple[StageConfig, ...] = Field(min_length=1)

    @field_validator("trackers", mode="before")
    @classmethod
    def _listed(cls, names: Any) -> Any:
        if isinstance(names, str):
            raise ValueError(f"give a list of names, such as [{names}]")
        return names

    @field_validator("trackers")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names:
            check_names(names)
        return names

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.teacher is not None and self.model is not None:
            raise ValueError("give either teacher (to distil) or model (to pretrain), not both")
        if self.model is not None and (self.adapters is not None or self.weights != "float32"):
            raise ValueError(
                "adapters and weights are for a teacher: a new network (model) is trained whole in float32"
            )
        if self.model_weights is not None and self.model is None:
            raise ValueError("model_weights are those that a new network (model) starts from: leave it out")
        later = [start for stage in self.stages[1:] for start in stage.starts]
        if self.model_weights is not None and "model" in later:
            raise ValueError("model_weights are not kept after the first stage: no later role can start from model")
        if self.data.kind == "prompts" and self.model is not None:
            raise ValueError("data.kind: prompts is for a teacher: a new network (model) learns from images or samples")
        for name in ("base", "base_sha256", "lora", "precision", "base_weights", "expert_backbones"):
            if self.model is not None and getattr(self.model, name) is not None:
                raise ValueError(f"model.{name} describes a trained model, not a new one: leave it out")
        if self.weights in ("int8", "nf4") and self.adapters is None:
            raise ValueError(f"weights: {self.weights} cannot be trained; add adapters")
        copies = [  # of the teacher
            role
            for k, stage in enumerate(self.stages)
            for name, role in stage.roles.items()
            if self.origins(k)[name] not in self.networks
        ]
        if self.weights in ("int8", "nf4") and any(role.full_finetune for role in copies):
            raise ValueError(f"weights: {self.weights} cannot be trained, so no role can have full_finetune")
        if self.shard and self.offload:
            raise ValueError("shard and offload both save device memory; give one of them")
        if self.shard and self.weights in ("int8", "nf4"):
            raise ValueError(f"shard splits floating-point weights, not weights: {self.weights}")
        roles = [role for stage in self.stages for role in stage.roles.values()]
        if self.shard and any(role.optimizer == "adamw8bit" for role in roles):
            raise ValueError("shard splits the moments of adamw, not those of adamw8bit")
        if self.shard and self.adapters is not None and any(role.full_finetune for role in copies):
            raise ValueError("with shard and adapters, no role can have full_finetune: the shared network is split")
        if self.offload and self.adapters is not None:
            raise ValueError("offload is for copies: with adapters every evaluation needs the one shared network")
        saving = {"offload": self.offload, "shard": self.shard, "gradient_checkpointing": self.gradient_checkpointing}
        saving[f"weights: {self.weights}"] = self.weights in ("int8", "nf4")
        if self.cuda_graphs and any(saving.values()):
            others = " and ".join(name for name, on in saving.items() if on)
            raise ValueError(f"cuda_graphs takes memory to save time, and {others} the reverse: leave one of them out")
        return self

    @model_validator(mode="after")
    def _networks_fit(self) -> Self:
        if self.networks and self.model is not None:
            raise ValueError("networks are for a teacher's students, not for a new network (model)")
        names = {"teacher", "model", "keep", "new"}.union(*({*stage.roles, *stage.freeze} for stage in self.stages))
        if taken := sorted(names & self.networks.keys()):
            raise ValueError(f"networks.{taken[0]}: roles and values of init have this name; choose another")
        if unused := sorted(self.networks.keys() - set[str]().union(*(stage.starts for stage in self.stages))):
            raise ValueError(f"networks.{unused[0]}: no role starts from it; set init: {unused[0]} for one")
        for k, stage in enumerate(self.stages):
            for name, role in stage.roles.items():
                adapts = self.adapters is not None and role.init != "keep" and not role.full_finetune
                if adapts and self.origins(k)[name] in self.networks:
                    raise ValueError(
                        f"stages.{k}.roles.{name}.init = {role.init!r}: adapters are on the teacher's network, and "
                        "this is another one; set full_finetune: true for this role"
                    )
        return self

    def origins(self, number: int) -> dict[str, str]:
        """The network that each role of a stage is a copy of: ``teacher``, ``model``, or one of ``networks``."""
        first = "teacher" if self.model is None else "model"
        found = {first: first} | {name: name for name in self.networks}
        for stage in self.stages[: number + 1]:
            starts = {name: name if role.init == "keep" else role.init for name, role in stage.roles.items()}
            found |= {name: found.get(start, first) for name, start in (stage.freeze | starts).items()}
        return found

    @property
    def steps(self) -> int:
        """The number of steps of all stages."""
        return sum(stage.steps for stage in self.stages)
