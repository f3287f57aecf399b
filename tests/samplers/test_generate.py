"""Generated samples and images: whose noise they take, their counts, conditioned students, prompts and parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import FLOW, MIXTURE

from fewstep.core.errors import UserError
from fewstep.core.image_files import to_bytes
from fewstep.core.keyed_random import KeyedRandom
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.guidance import Guidance
from fewstep.models.loading import Model
from fewstep.models.mixture import GaussianMixture, MixtureBackbone
from fewstep.models.model_config import FewStep, ModelConfig
from fewstep.samplers import generate as module
from fewstep.samplers.generate import GeneratedSet, ImageGenerator, SampleNoise, generate, integrate
from fewstep.samplers.plan import Plan, SamplingConfig, plan
from fewstep.samplers.predictor import Predictor
from fewstep.samplers.solvers import Solver

CPU = torch.device("cpu")
LABELLED = GaussianMixture([0.3, 0.7], [[-1.5, 0.5], [1.0, -0.5]], [0.4, 0.6], labels=[0, 1])
CONFIG = ModelConfig(backbone={"name": "unet"}, shape=(2,), classes=2)
TEACHER = Model(denoiser=Denoiser(MixtureBackbone(LABELLED, FLOW), FLOW, "x0"), config=CONFIG)
LABELS = torch.tensor([0, 1, 1, 0, 1])


def test_the_noise_of_a_sample_has_a_key_of_its_own() -> None:
    """Saved samples can be computed again: by seed and number, in the stream "sample"."""
    first = KeyedRandom(7, 3, "sample", 0)
    noise = SampleNoise(7, [3], (4,), CPU)
    for _ in range(2):
        assert torch.equal(noise()[0], first.normal((4,)))


def test_samples_are_integrated_from_their_own_noise_with_their_guidance() -> None:
    config = SamplingConfig("ddpm", 4, guidance=2.0, seed=5)
    got = generate(TEACHER, LABELS, config, numbers=[4, 9, 2, 0, 7], batch=2)
    condition = Condition.of_labels(LABELS, 2)
    for k, number in enumerate((4, 9, 2, 0, 7)):
        alone = integrate(
            TEACHER.denoiser, condition.index(slice(k, k + 1)), (2,), plan=plan(TEACHER, config), numbers=[number],
            guidance=Guidance(2.0), seed=5,
        )  # fmt: skip
        torch.testing.assert_close(got.x0[k : k + 1], alone.x0, rtol=0, atol=1e-6)
    assert got.nfe == 8, "two evaluations per step"
    by_default = generate(TEACHER, LABELS, config)
    assert torch.equal(by_default.x0, generate(TEACHER, condition, config, numbers=range(5)).x0)
    assert not torch.equal(by_default.x0, generate(TEACHER, LABELS, SamplingConfig("ddpm", 4, 2.0, seed=6)).x0)
    zero = integrate(TEACHER.denoiser, condition, (2,), plan=plan(TEACHER, config), numbers=range(5))
    assert zero.nfe == 4
    assert torch.equal(zero.x0, generate(TEACHER, LABELS, SamplingConfig("ddpm", 4)).x0), "seed 0, no guidance"


def test_a_student_that_is_conditioned_on_its_number_of_steps_receives_it() -> None:
    received: list[list[int]] = []

    class Counting(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            received.append(condition["steps"].tolist())
            return x_t

    few_step = FewStep(times=(1.0, 0.5), rule="renoise", counts=(1, 2, 4))
    config = CONFIG.model_copy(update={"few_step": few_step})
    student = Model(denoiser=Denoiser(Counting(), FLOW, "x0"), config=config)
    for steps in (1, 4):
        generate(student, LABELS, SamplingConfig(steps=steps))
        assert received == [[steps] * 5] * steps
        received.clear()


def test_a_last_state_that_is_not_finite_is_named_with_its_step() -> None:
    def run(predict: Predictor, x: Tensor, times: Any) -> Tensor:
        return predict(x, times[0]).x0 / 0

    request = Plan(Solver(run, 1, 1, "none", name="mine"), (1.0, 0.8, 0.5, 0.0))
    message = r"Sampling with mine failed: the state is not finite in step 3 of 3, which starts at t = 0\.5\. Check"
    denoiser = Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0")
    with pytest.raises(UserError, match=message):
        integrate(denoiser, Condition(), (2,), plan=request, numbers=range(4))


@pytest.mark.parametrize(("at", "step"), [(0.8, 1), (0.65, 2), (0.5, 2), (0.2, 3)])
def test_a_state_that_is_not_finite_at_an_evaluation_belongs_to_the_step_before(at: float, step: int) -> None:
    """At a node, to the step that ends there; between two, to the step around it."""

    def run(predict: Predictor, x: Tensor, times: Any) -> Tensor:
        predict(x, times[0])
        return predict(x / 0, at).x0

    request = Plan(Solver(run, 1, 1, "none"), (1.0, 0.8, 0.5, 0.0))
    denoiser = Denoiser(MixtureBackbone(MIXTURE, FLOW), FLOW, "x0")
    start = request.times[step - 1]
    message = rf"this solver failed: the state is not finite in step {step} of 3, which starts at t = {start:g}\."
    with pytest.raises(UserError, match=message):
        integrate(denoiser, Condition(), (2,), plan=request, numbers=range(4))


# --- images -----------------------------------------------------------------------------------------------------------


class Pipeline:
    """A stand-in for a folder of a diffusers pipeline: the condition is the length of the prompt."""

    def __init__(self) -> None:
        self.encoded: list[list[str]] = []
        self.batches: list[int] = []

    def pipeline(self) -> Any:
        return SimpleNamespace(to=lambda device: ("pipeline", device))

    def condition(self, pipeline: Any, prompts: list[str]) -> Condition:
        assert pipeline == ("pipeline", CPU)
        self.encoded.append(prompts)
        return Condition({"labels": torch.tensor([len(prompt) % 2 for prompt in prompts])}, {"labels": torch.tensor(2)})

    def decode_images(self, pipeline: Any, x0: Tensor, batch: int) -> Tensor:
        assert pipeline == ("pipeline", CPU)
        self.batches.append(batch)
        return to_bytes(x0)


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    folder = Pipeline()
    monkeypatch.setattr(module, "pipeline_of", lambda model: {id(TEACHER): folder}[id(model)])
    return folder


def test_prompts_are_encoded_once_each_and_decoded_in_batches(text: Pipeline) -> None:
    generator = ImageGenerator(TEACHER, ["a", "bb", "ccc"], batch=2)
    assert (generator.conditions, generator.nfe) == (3, 0)
    config, done = SamplingConfig("euler", 3), []
    images = generator([2, 0, 2, 1], config, numbers=[5, 6, 7, 8], progress=done.append)
    assert text.encoded == [["a", "bb", "ccc"]]
    assert text.batches == [2]
    assert done == [2, 4]
    assert generator.nfe == 3
    expected = generate(TEACHER, torch.tensor([1, 1, 1, 0]), config, numbers=[5, 6, 7, 8])
    assert torch.equal(images, to_bytes(expected.x0))
    assert torch.equal(generator([0, 1], config), to_bytes(generate(TEACHER, torch.tensor([1, 0]), config).x0))
    ImageGenerator(TEACHER, ["a"])([0], config)
    assert text.batches[-1] == 8, "by default"


def test_the_batch_is_that_of_models_of_classes_too() -> None:
    done: list[int] = []
    for batch, expected in ((3, [3, 6, 7]), (None, [7])):
        done.clear()
        for _ in GeneratedSet(TEACHER, SamplingConfig("euler", 1), 7, batch=batch, progress=done.append).parts():
            pass
        assert done == expected


def test_a_set_of_images_does_not_depend_on_its_parts(monkeypatch: pytest.MonkeyPatch, text: Pipeline) -> None:
    """Image k shows condition k modulo their number, with the noise of number k."""
    config = SamplingConfig("euler", 3, seed=2)
    whole = to_bytes(generate(TEACHER, torch.arange(7) % 2, config).x0)
    clock = iter(range(100))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    for part in (500, 3):
        monkeypatch.setattr(module, "PART", part)
        images = GeneratedSet(TEACHER, config, 7)
        assert torch.equal(torch.cat(list(images.parts())), whole)
        assert images.nfe == 3
        assert images.seconds == (1 if part == 500 else 3), "one tick per part; the time between parts does not count"
    prompts = GeneratedSet(TEACHER, config, 4, prompts=["a", "bb"], batch=3)
    expected = to_bytes(generate(TEACHER, torch.tensor([1, 0, 1, 0]), config).x0)
    assert torch.equal(torch.cat(list(prompts.parts())), expected)
    assert text.batches == [3, 3], "of pipelines, one per part"
