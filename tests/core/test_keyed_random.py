"""Random numbers keyed by (seed, step, update, shard, stream, count so far), without state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewstep.core.keyed_random import KeyedRandom

KEY = (7, 100, "student", 2)
Draw = Callable[[KeyedRandom], Tensor]
every_draw = pytest.mark.parametrize(
    "draw",
    [lambda d: d.normal((64,)), lambda d: d.uniform(64), lambda d: d.integers(64, 10**9)],
    ids=["normal", "uniform", "integers"],
)


@every_draw
def test_one_key_gives_one_sequence(draw: Draw) -> None:
    one, two = KeyedRandom(*KEY), KeyedRandom(*KEY)
    for _ in range(3):
        assert draw(one).equal(draw(two))


@every_draw
def test_the_calls_of_a_sequence_differ(draw: Draw) -> None:
    random = KeyedRandom(*KEY)
    assert not draw(random).equal(draw(random))


@every_draw
@pytest.mark.parametrize(
    "other", [(8, *KEY[1:]), (7, 101, "student", 2), (7, 100, "fake", 2), (*KEY[:3], 3), (71, 0, "student", 2)]
)
def test_every_part_of_the_key_matters(draw: Draw, other: tuple[int, int, str, int]) -> None:
    assert not draw(KeyedRandom(*KEY)).equal(draw(KeyedRandom(*other)))


def test_streams_of_different_names_do_not_disturb_each_other() -> None:
    plain, busy = KeyedRandom(*KEY), KeyedRandom(*KEY)
    busy.normal((3,), "other")
    busy.stream("rollout").normal((3,))
    assert busy.normal((3,)).equal(plain.normal((3,)))
    assert not busy.normal((3,), "other").equal(plain.normal((3,)))


def test_a_stream_starts_again_whenever_it_is_asked_for() -> None:
    random = KeyedRandom(*KEY)
    first = random.stream("rollout").normal((3,))
    random.normal((3,))
    assert random.stream("rollout").normal((3,)).equal(first)
    assert not random.stream("validation").normal((3,)).equal(first)
    assert not random.stream("rollout").stream("rollout").normal((3,)).equal(first)
    kept = random.stream("rollout")
    assert [kept.normal((3,)).equal(first) for _ in range(2)] == [True, False]


def test_shared_draws_are_those_of_every_shard_but_of_no_other_key() -> None:
    drawn = [KeyedRandom(7, 100, "student", shard).shared.integers(8, 1000) for shard in range(3)]
    assert drawn[0].equal(drawn[1])
    assert drawn[0].equal(drawn[2])
    assert not drawn[0].equal(KeyedRandom(7, 101, "student", 0).shared.integers(8, 1000))
    assert not drawn[0].equal(KeyedRandom(7, 100, "student", 0).integers(8, 1000))
    stream = [KeyedRandom(7, 100, "student", shard).stream("rollout").shared.integers(8, 1000) for shard in range(2)]
    assert stream[0].equal(stream[1])
    assert not stream[0].equal(drawn[0]), "a shared draw stays in its stream"


@every_draw
def test_the_global_generator_is_neither_read_nor_moved(draw: Draw) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = draw(KeyedRandom(*KEY))
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(1)
    assert draw(KeyedRandom(*KEY)).equal(drawn)


def test_shapes_types_and_ranges() -> None:
    random = KeyedRandom(*KEY)
    normal, uniform, integers = random.normal((100, 50)), random.uniform(5000, 0.02, 0.98), random.integers(5000, 10)
    assert (normal.shape, normal.dtype) == ((100, 50), torch.float32)
    assert (normal.mean().abs() < 0.05, normal.std().sub(1).abs() < 0.05) == (True, True)
    assert (uniform.shape, uniform.dtype) == ((5000,), torch.float64)
    assert ((uniform >= 0.02) & (uniform < 0.98)).all()
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert (integers.shape, integers.dtype) == ((5000,), torch.int64)
    assert integers.unique().tolist() == list(range(10))


def test_a_float64_default_does_not_change_the_noise() -> None:
    expected = KeyedRandom(*KEY).normal((3,))
    torch.set_default_dtype(torch.float64)
    try:
        assert KeyedRandom(*KEY).normal((3,)).equal(expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_numbers_are_fixed_for_good() -> None:
    """Recorded runs can be replayed as long as a key becomes a seed in this way."""
    digest = hashlib.blake2b(b"0/1/student/2/rollout/index/0", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    drawn = KeyedRandom(0, 1, "student", 2).stream("rollout").integers(4, 1000)
    assert drawn.equal(torch.randint(1000, (4,), generator=generator))
