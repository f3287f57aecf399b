"""Creating the files that training reads: encoded prompts, ODE pairs, preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fewstep.api.models import Source, load, noise_image
from fewstep.api.reference import classifier_for
from fewstep.core.devices import pick_device
from fewstep.core.errors import UserError
from fewstep.core.files import check_writable, write_tensors
from fewstep.core.image_files import to_images
from fewstep.core.tables import IMAGE_COLUMNS, TABLE_SUFFIXES, choose_column, read_texts, table_columns
from fewstep.distill.data.stored_files import write_stored
from fewstep.eval.hashes import json_sha256, model_sha256
from fewstep.eval.rewards.registry import find_prompt_reward, find_reward, rate
from fewstep.models.condition import Condition
from fewstep.models.hub.encode import (
    Captioned,
    captioned_folder,
    captioned_table,
    encode_images,
    encode_prompts,
    require_vae,
)
from fewstep.models.hub.encoded import EncodedPrompts, fingerprint
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.pairs import encode_pairs
from fewstep.models.loading import Model, pipeline_of, resolve_path
from fewstep.models.model_config import Size
from fewstep.samplers.generate import BATCH, PIPELINE_BATCH, SampleNoise, generate
from fewstep.samplers.plan import SamplingConfig, frames_of, plan

COLUMN = "--column NAME"  # of a table's captions


def encode(
    teacher: Source, prompts: Source, out: Source, *, column: str | None = None, sizes: Sequence[tuple[int, int]] = (),
    frames: int = 1, batch: int = 16, rows: int = 512, device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Encodes the prompts of a text file, one per line, or of a table (.csv, .jsonl, .parquet) with a pipeline's text
    encoders, for ``data.kind=prompts``; ``column`` of a table is by default the only one called caption, prompt or
    text. Of a folder of images (or videos, with ``frames``) with captions beside them (``a.png``, ``a.txt``), and of a
    table with a column of images (``image``, ``file_name``), encodes these too, with the pipeline's VAE, each at the
    nearest of the ``sizes`` (height, width). Of a table (.csv or .jsonl) of preference pairs with the columns winner,
    loser and caption, encodes both images. Tables name files in their own folder; a .parquet table may hold the images.

    Returns the number of prompts, images or pairs. Existing shards are kept. Raises ``UserError`` on a line or row that
    is empty or damaged, on a pipeline without text encoders, and on a folder of other prompts.
    """
    folder, given, place = PipelineFolder.open(resolve_path(teacher)), Path(prompts), pick_device(device)
    images, pairs = _images(folder, given, column, frames)
    if pairs:
        return encode_pairs(
            folder, given, Path(out), sizes=sizes, frames=frames, batch=batch, rows=rows, device=place,
            progress=progress,
        )  # fmt: skip
    if images:
        return encode_images(
            folder, images, Path(out), sizes=sizes, frames=frames, batch=batch, rows=rows, device=place,
            progress=progress,
        )  # fmt: skip
    if sizes or frames != 1:
        raise UserError(f"{given} holds prompts, without images or videos: remove --sizes and --frames.")
    lines = read_texts(given, column, COLUMN)
    encode_prompts(folder, lines, Path(out), batch=batch, rows=rows, device=place, progress=progress)
    return len(lines)


def _images(folder: PipelineFolder, given: Path, column: str | None, frames: int) -> tuple[list[Captioned], bool]:
    """The captioned images of a folder or table, and whether it is a table of preference pairs."""
    if given.is_dir():
        if column is not None:
            raise UserError(f"{given} is a folder, without columns: remove --column.")
        require_vae(folder)
        return captioned_folder(given, frames), False
    if given.suffix.lower() not in TABLE_SUFFIXES:
        return [], False
    columns = table_columns(given)
    if {"winner", "loser"} & set(columns):
        if column is not None:
            raise UserError(f"{given} has preference pairs, whose captions are in the column caption: remove --column.")
        return [], True
    image = choose_column(str(given), columns, None, IMAGE_COLUMNS, "image", required=False)
    return (captioned_table(given, image, column, frames, COLUMN) if image is not None else []), False


def make_ode_pairs(
    source: Source, file: Source, *, n: int = 10_000, captions: Source | None = None,
    sampling: SamplingConfig | None = None, device: str = "auto", progress: Callable[[int], None] | None = None,
) -> None:  # fmt: skip
    """Writes ``n`` pairs of noise and what a teacher's solver maps it to, with labels in turn, as a safetensors file.
    The default is 18 Heun steps. A model that takes words needs ``captions``, a text file with one per line or a table
    (see ``encode``). Raises ``UserError`` on a solver that adds noise, which is no map, on a pipeline, and on a model
    that generates frame by frame, each with noise of its own and after clean frames."""
    if n < 1:
        raise UserError(f"n must be at least 1, got {n}.")
    check_writable(file, *_files(captions))
    model, texts = load(source, device), _texts(captions, n)
    condition, numbers = _in_turn(model, n, texts)
    sampling = sampling or SamplingConfig("heun", 18)
    if (solver := plan(model, sampling).solver).noisy:
        raise UserError(
            f"The solver {solver.name!r} adds noise, so that its samples are no function of the first noise."
        )
    if frames_of(model, sampling) is not None:
        raise UserError(
            "ODE pairs are of whole samples, and this model generates frame by frame: take its teacher or the causal "
            "model that it started from, and leave frames out."
        )
    samples = generate(model, condition, sampling, numbers=range(n), progress=progress)
    noise = SampleNoise(sampling.seed, range(n), model.config.shape, torch.device("cpu"))()
    start = float(model.denoiser.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)))
    write_stored(Path(file), {"noise": start * noise, "x0": samples.x0}, numbers, texts)


def _files(given: Source | None) -> list[Path]:
    return [Path(given)] if given is not None else []


def _texts(captions: Source | None, n: int) -> list[str]:
    """The captions that ``n`` samples use; none without a file."""
    return read_texts(Path(captions))[:n] if captions is not None else []


def _in_turn(model: Model, n: int, captions: Sequence[str]) -> tuple[Condition, Tensor]:
    """The conditions of ``n`` samples, and their labels or the numbers of their ``captions``, int64 [n]: all in turn.
    Raises ``UserError`` on a pipeline, and on captions for a model of labels or none for one of words."""
    if model.config.vocabulary is None and captions and not model.config.takes_prompts:
        raise UserError("This model takes class labels: leave captions out.")
    if model.config.vocabulary is None:
        labels = model.labels(n)
        return Condition.of_labels(labels, model.config.classes), labels
    if not captions:
        raise UserError("This model takes words: give captions, a file with one per line (--captions).")
    rows = torch.arange(n) % len(captions)
    return model.config.vocabulary.encode(captions)(rows), rows


def make_preferences(
    source: Source, out: Source, *, reward: str, n: int = 2_000, candidates: int = 4, captions: Source | None = None,
    size: Size | None = None, sampling: SamplingConfig | None = None, reference: str | None = None,
    batch: int | None = None, rows: int = 512, device: str = "auto", progress: Callable[[int], None] | None = None,
) -> int:  # fmt: skip
    """Writes preference pairs: of ``candidates`` samples for each of ``n`` labels, the one with the highest ``reward``
    is the ``winner`` and the one with the lowest the ``loser``. ``out`` is a safetensors file.

    A model that takes prompts needs ``captions``, a text file with one per line or a table (see ``encode``), which are
    used in turn. ``batch`` samples are generated at a time, by default 8 of a pipeline and 100 of another model. Of a
    pipeline, ``size`` is that of its samples in pixels, and ``out`` a folder in the format of ``encode``, with the
    encoded captions and shards of ``rows`` pairs; existing shards are kept.

    Returns the number of pairs whose candidates all have one reward: their winner is their loser, and training learns
    nothing from them.

    Raises ``UserError`` on an unknown reward, on one that is equal for all candidates, on fewer than two candidates, on
    captions for a class-conditional model, and on a folder of other pairs.
    """
    if n < 1 or candidates < 2:
        raise UserError(f"A pair needs two candidates and n at least 1, got {candidates} and {n}.")
    model, sampling = load(source, device, size), sampling or SamplingConfig()
    if captions is None:
        model.labels(n)  # refuses a model that takes prompts
    judge = find_reward(reward) if captions is None else find_prompt_reward(reward)
    plan(model, sampling)
    network = classifier_for(source, reference, model.device)
    native = captions is None or model.config.vocabulary is not None
    batch = batch or (BATCH if native else PIPELINE_BATCH)
    compare = _Comparison(model, sampling, partial(rate, reward, judge, network), n, candidates, batch, progress)
    if native:
        check_writable(out, *_files(captions))
        texts = _texts(captions, n)
        condition, in_turn = _in_turn(model, n, texts)
        shown = [texts[k] for k in in_turn.tolist()] if texts else in_turn
        trial = shown[:1] if isinstance(shown, list) else shown.max()[None]  # the class that a classifier may lack
        rate(reward, judge, network, noise_image(model), trial)  # refused before sampling
        winner, loser = compare(range(n), condition, shown, to_images)
        write_stored(Path(out), {"winner": winner, "loser": loser}, in_turn, texts)
        return _ties(winner, loser)
    assert captions is not None
    folder, texts = pipeline_of(model), read_texts(Path(captions))
    require_vae(folder)
    rate(reward, judge, network, noise_image(model), texts[:1])  # refused before sampling
    made_from = {
        "model": model_sha256(model), "vae": fingerprint(folder, ("vae",)), "reward": reward,
        "reference": network.sha256, "candidates": candidates, "sampling": sampling.as_dict(),
    }  # fmt: skip
    encode_prompts(folder, texts, Path(out), rows=rows, device=model.device, pairs=n, source=json_sha256(made_from))
    encoded, pipeline = EncodedPrompts(Path(out), samples=False), folder.pipeline().to(model.device)
    for shard, first in enumerate(range(0, n, rows)):
        file, numbers = Path(out) / f"pairs-{shard:05d}.safetensors", range(first, min(first + rows, n))
        if not file.is_file():
            prompt = torch.tensor(numbers) % len(texts)
            prompts = [texts[k] for k in prompt.tolist()]
            decode = partial(folder.decode_images, pipeline, batch=batch)
            winner, loser = compare(numbers, encoded(prompt), prompts, decode)
            write_tensors({"winner": winner, "loser": loser, "prompt": prompt}, file)
    buckets = EncodedPrompts(Path(out)).buckets
    return sum(_ties(bucket.latents["winner"], bucket.latents["loser"]) for bucket in buckets)


def _ties(winner: Tensor, loser: Tensor) -> int:
    return int((winner == loser).flatten(1).all(1).sum())


@dataclass(frozen=True)
class _Comparison:
    """Generates candidates and keeps the best and the worst by a reward."""

    model: Model
    sampling: SamplingConfig
    rate: Callable[[Tensor, Tensor | Sequence[str]], Tensor]
    n: int
    candidates: int
    batch: int
    progress: Callable[[int], None] | None

    def __call__(
        self, numbers: range, condition: Condition, shown: Tensor | Sequence[str], decode: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The winners and losers [N, ...] for the rows of a condition; ``shown`` is what the reward sees of it. The
        candidates of pair k have the noise of the samples k, k + n, k + 2 n, ..."""
        x0, rewards = [], []
        for candidate in range(self.candidates):
            before = self.candidates * numbers.start + candidate * len(numbers)
            own = range(candidate * self.n + numbers.start, candidate * self.n + numbers.stop)
            report = partial(self._report, before)
            found = generate(self.model, condition, self.sampling, numbers=own, batch=self.batch, progress=report)
            x0.append(found.x0)
            rewards.append(self.rate(decode(x0[-1]), shown))
        samples, rated, each = torch.stack(x0), torch.stack(rewards), torch.arange(len(numbers))
        if numbers.start == 0 and (rated == rated[0]).all():  # each winner would be its own loser
            raise UserError(f"The reward is equal for all candidates of the first {len(each)} pairs: it prefers none.")
        return samples[rated.argmax(0), each], samples[rated.argmin(0), each]

    def _report(self, before: int, done: int) -> None:
        if self.progress is not None:
            self.progress(before + done)
