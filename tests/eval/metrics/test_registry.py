"""What every metric declares: its direction, the features it needs, and the number of images it needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_sets import normal
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.eval.feature_statistics import FeatureStatistics
from fewstep.eval.metrics.clip_score import cosines
from fewstep.eval.metrics.cmmd import cmmd
from fewstep.eval.metrics.diversity import cross_seed_diversity
from fewstep.eval.metrics.frechet import Statistics, frechet_distance, frechet_error, grouped_moments
from fewstep.eval.metrics.inception_score import split_scores
from fewstep.eval.metrics.kid import kid, subset_values
from fewstep.eval.metrics.metric import Metric, MetricInput
from fewstep.eval.metrics.precision_recall import precision_recall
from fewstep.eval.metrics.registry import METRICS
from fewstep.eval.networks.clip import PREFIX

NAMES = METRICS.names()
CONDITIONS = 3


def statistics(features: Tensor, keep_rows: bool = True) -> FeatureStatistics:
    groups = grouped_moments(features)
    return FeatureStatistics(Statistics.of(features), features if keep_rows else None, None, None, groups=groups)


def inputs(
    metric: Metric, n: int, *, collapsed: bool = False, keep_rows: bool = True, real: bool = True
) -> MetricInput:
    """``n`` images of ``CONDITIONS`` captions: distributed as the real ones, or collapsed to a distant point."""
    features = normal(n, 4, seed=1).float() + 2
    if collapsed:
        features = 0.05 * features + 10
    if metric.network == "inception_classes":
        features = (3 * features).softmax(1)
    texts = F.normalize(normal(CONDITIONS, 4, seed=2).float(), dim=1)
    reference = statistics(normal(40, 4).float() + 2) if real else None
    return MetricInput(statistics(features, keep_rows), reference, {"": texts, PREFIX: texts}, CONDITIONS)


def images_needed(metric: Metric) -> int:
    return metric.minimum_n * (CONDITIONS if metric.per_condition else 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_is_finite_at_its_smallest_number_of_images_and_refuses_fewer(name: str) -> None:
    metric = METRICS.resolve(name)
    n = images_needed(metric)
    metric.check_count(n, CONDITIONS)
    measured = metric.measure(inputs(metric, n))
    assert math.isfinite(measured.value)
    assert (measured.error is None) == (measured.error_of is None)
    with pytest.raises(UserError, match=f"{name} needs at least {n} images.*, got {n - 1}"):
        metric.check_count(n - 1, CONDITIONS)
    with pytest.raises(UserError):
        metric.compute(inputs(metric, n - 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_declares_whether_it_needs_every_image_and_a_reference(name: str) -> None:
    metric = METRICS.resolve(name)
    without_rows, without_reference = inputs(metric, 30, keep_rows=False), inputs(metric, 30, real=False)
    if metric.needs_features:
        with pytest.raises(UserError, match="every image's features"):
            metric.compute(without_rows)
    else:
        metric.compute(without_rows)
    without_real_rows = replace(inputs(metric, 30), reference=statistics(normal(40, 4).float() + 2, keep_rows=False))
    if metric.needs_real_features:
        with pytest.raises(UserError, match="every image's features"):
            metric.compute(without_real_rows)
    else:
        metric.compute(without_real_rows)
    if metric.needs_reference:
        with pytest.raises(AssertionError):
            metric.compute(without_reference)
    else:
        metric.compute(without_reference)


@pytest.mark.parametrize("name", NAMES)
def test_the_direction_of_a_metric_is_that_in_which_it_changes_for_better_images(name: str) -> None:
    """Real images are better than collapsed ones, and captioned images than those of opposite meaning."""
    metric = METRICS.resolve(name)
    good, bad = inputs(metric, 60), inputs(metric, 60, collapsed=True)
    if metric.caption_prefix is not None:
        texts = good.texts[""].repeat(20, 1)
        good, bad = (replace(good, images=statistics(sign * texts + 0.1 * normal(60, 4).float())) for sign in (1, -1))
    assert (metric.compute(good) < metric.compute(bad)) == (metric.direction == "lower")


def test_the_images_of_an_unknown_number_of_conditions_have_no_diversity() -> None:
    for name in ("diversity", "similarity"):
        with pytest.raises(UserError, match=f"{name} needs captions or classes"):
            METRICS.resolve(name).check_count(1000, 0)


def test_images_in_turn_are_ordered_by_seed_and_condition() -> None:
    """Image k shows condition k % 3; an incomplete last turn is left out."""
    own = inputs(METRICS.resolve("diversity"), 8)
    features = own.images.features()
    torch.testing.assert_close(own.features_by_seed(), torch.stack([features[:3], features[3:6]]))
    of_one = replace(inputs(METRICS.resolve("diversity"), 120), conditions=1)
    assert of_one.features_by_seed().shape[:2] == (60, 2)
    for n, conditions in ((5, CONDITIONS), (8, 0)):
        few = replace(inputs(METRICS.resolve("diversity"), n), conditions=conditions)
        message = f"{n} images of {conditions} conditions: two images per condition are needed"
        with pytest.raises(UserError, match=message):
            few.features_by_seed()


def test_too_few_images_are_counted_in_words() -> None:
    with pytest.raises(UserError, match=r"^kid needs at least 2 images, got 1\.$"):
        METRICS.resolve("kid").check_count(1, 0)
    with pytest.raises(UserError, match=r"^diversity needs at least 6 images, 2 of each class or caption, got 5\.$"):
        METRICS.resolve("diversity").check_count(5, 3)


def test_the_clip_score_is_the_cosine_with_the_caption_in_turn() -> None:
    metric = METRICS.resolve("clip_score")
    assert replace(metric, caption_prefix="a painting of ").needs_captions
    own = inputs(metric, 7)
    images, texts = own.images.features(), own.texts[""]
    expected = torch.tensor([float(images[k] @ texts[k % CONDITIONS]) for k in range(7)], dtype=torch.float64)
    torch.testing.assert_close(cosines(own, ""), expected, rtol=1e-6, atol=1e-6)
    measured = metric.measure(own)
    assert (measured.value, measured.error) == pytest.approx((expected.mean().item(), expected.std().item() / 7**0.5))
    other = replace(own, texts={"": texts, PREFIX: -texts})
    assert METRICS.resolve("clip_score_dmd2").measure(other).value == pytest.approx(-measured.value)


def test_metrics_that_are_results_of_one_computation_compute_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*features: Tensor) -> tuple[float, float]:
        calls.append(1)
        return 0.25, 0.75

    monkeypatch.setattr("fewstep.eval.metrics.precision_recall.precision_recall", counted)
    precision, recall = METRICS.resolve("precision"), METRICS.resolve("recall")
    shared = inputs(precision, 20)
    assert (precision.compute(shared), recall.compute(shared)) == (0.25, 0.75)
    assert len(calls) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "metric",
    [
        lambda x, y: frechet_distance(Statistics.of(x), Statistics.of(y)), kid, cmmd, precision_recall,
        lambda x, y: cross_seed_diversity(torch.stack([x, y])),
    ],
    ids=["frechet", "kid", "cmmd", "precision_recall", "diversity"],
)  # fmt: skip
def test_features_that_are_not_finite_are_refused(metric: Callable[[Tensor, Tensor], object], value: float) -> None:
    broken = normal(10, 3)
    broken[4, 1] = value
    with pytest.raises(UserError, match="1 of 10 images"):
        metric(normal(10, 3), broken)


@pytest.mark.parametrize("metric", [kid, cmmd, precision_recall])
def test_features_of_different_networks_are_refused(metric: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(UserError, match="the same D"):
        metric(normal(10, 3), normal(10, 4))


def test_a_value_that_is_not_finite_is_an_error_and_not_a_score() -> None:
    fid = METRICS.resolve("fid")
    for wrong in (replace(fid, compute=lambda _: math.nan), replace(fid, error=lambda _: math.inf, error_of="error")):
        with pytest.raises(UserError, match=r"fid is .* no score is written\. Check the images and the reference\.$"):
            wrong.measure(inputs(fid, 10))


@pytest.mark.parametrize(("share", "noted"), [(0.004, False), (0.006, True)])
def test_a_bias_above_a_twentieth_of_the_value_is_noted(share: float, noted: bool) -> None:
    """Here, of 20 images: the bias is 20 times ``share``, the value 2."""
    metric = replace(METRICS.resolve("fid"), compute=lambda _: 2.0, bias=lambda _, n: n * share)
    measured = metric.measure(inputs(metric, 20))
    assert measured.bias == (pytest.approx(20 * share) if noted else None)
    assert replace(metric, bias=None).measure(inputs(metric, 20)).bias is None


def test_error_bars_are_the_deviations_that_their_names_say() -> None:
    """KID: its subsets. Inception Score: its splits. CLIP score: its mean. FID-infinity: its fit. Others: images."""
    measured = {}
    for name in ("kid", "inception_score", "clip_score", "fid_infinity", "fid", "vendi", "cmmd", "precision"):
        metric = METRICS.resolve(name)
        own = inputs(metric, 90)
        measured[name] = metric.measure(own)
        if name == "kid":
            values = subset_values(*own.both)
            assert measured[name].error == pytest.approx(float(values.std()))
            assert measured[name].value == pytest.approx(kid(*own.both))
        if name == "inception_score":
            assert measured[name].error == pytest.approx(float(split_scores(own.images.features()).std(correction=0)))
        if name == "clip_score":
            assert measured[name].error == pytest.approx(float(cosines(own, "").std()) / 90**0.5)
        if name == "fid":
            assert measured[name].error == frechet_error(own.images.groups, own.real.statistics)
    assert {name: each.error_of for name, each in measured.items()} == {
        "kid": "standard deviation over 100 subsets",
        "inception_score": "standard deviation over 10 splits, shuffled by a fixed seed",
        "clip_score": "standard error of the mean over images",
        "fid_infinity": "standard error of the fit",
        "fid": "standard error over samples (jackknife, 10 groups)",
        "vendi": "standard error over samples (jackknife, 10 groups)",
        "cmmd": "standard error over images, to first order",
        "precision": "half of Wilson's 68 % interval of a share of the images",
    }


def test_every_frechet_distance_has_an_error_bar_and_asks_for_the_groups_it_needs() -> None:
    for name in ("fid", "sfid", "patch_fid", "fd_dinov2", "fd_efficientnet", "clip_fid", "fvd"):
        metric = METRICS.resolve(name)
        assert metric.needs_groups, name
        assert (metric.measure(inputs(metric, 60)).error or 0) > 0, name
        few = metric.measure(inputs(metric, 19))
        assert few.error is few.error_of is None, name
    assert not METRICS.resolve("kid").needs_groups


def test_contradictory_declarations_are_refused() -> None:
    fid = METRICS.resolve("fid")
    with pytest.raises(ValueError, match="a bias needs a reference"):
        replace(fid, needs_reference=False)
    with pytest.raises(ValueError, match="features of real images need a reference"):
        replace(METRICS.resolve("vendi"), needs_real_features=True)
    with pytest.raises(ValueError, match="only the network 'clip' embeds captions"):
        replace(fid, caption_prefix="")
    with pytest.raises(ValueError, match="needs both error and error_of"):
        replace(METRICS.resolve("recall"), error=lambda _: 1.0)


def test_a_metric_of_the_users_own_is_found_by_its_dotted_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_metrics.py").write_text(
        "from fewstep.eval.metrics.metric import Metric\n"
        "SIZE = Metric('size', 'inception', 'higher', 2, lambda inputs: float(inputs.images.statistics.count))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert METRICS.resolve("my_metrics:SIZE").compute(inputs(METRICS.resolve("fid"), 7)) == 7
    with pytest.raises(UserError, match=r"'my_metrics:Metric' is not a fewstep\.eval\.metrics\.metric\.Metric"):
        METRICS.resolve("my_metrics:Metric")


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert {name for name in NAMES if f"`{name}`" not in text} == set()
