"""The loop's reports: the cause of a lost update, when training ends, means over processes, and what follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import Points

from fewstep.core.errors import UserError
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill import processes
from fewstep.distill.loop import Loop
from fewstep.distill.processes import World
from fewstep.distill.roles import Role, Roles
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update


class Three(nn.Module):
    """Three parameters, of which ``unused`` belongs to no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Parameter(torch.ones(2)) for _ in range(3))


Losses = Callable[[Three, int], Mapping[str, Tensor]]
After = Callable[[KeyedRandom, Mapping[str, Tensor]], None]


def loop_of(losses: Losses, *, after: After | None = None, **settings: object) -> Loop:
    """A loop with one update, of the losses of the network and the step."""
    network = Three()
    role = Role(network, torch.optim.SGD(network.parameters(), lr=1.0))
    role.optimizer.param_groups[0]["initial_lr"] = 1.0  # type: ignore[union-attr]

    def terms(micro: MicroBatch) -> Iterator[LossTerm]:
        micro.log("steps", torch.tensor(float(micro.step)))
        micro.total("images", torch.tensor(3.0))
        for name, loss in losses(network, micro.step).items():
            yield LossTerm(name, loss)

    update = Update("student", ("student",), terms, after=after)
    return Loop(Roles({"student": role}), Objective((update,)), {"data": Points(2)}, batch=4, **settings)  # type: ignore[arg-type]


def root_of_zero(parameter: Tensor) -> Tensor:
    """0, with an infinite gradient."""
    return (parameter - parameter.detach()).sqrt().sum()


@pytest.mark.parametrize(
    ("losses", "cause"),
    [
        (lambda n, _: {"x": n.a.sum() * torch.nan}, "loss/x is nan"),
        (lambda n, _: {"x": n.a.sum() * torch.inf, "y": n.b.sum(), "z": -n.b.sum() * torch.inf},
         "loss/x is inf and loss/z is -inf"),
        (lambda n, _: {"x": root_of_zero(n.a)}, "its losses are finite, but not the gradient of student.a"),
        (lambda n, _: {"x": n.a.sum() + root_of_zero(n.b)},
         "its losses are finite, but not the gradient of student.b"),
        (lambda n, _: {"x": root_of_zero(n.a) + root_of_zero(n.b)},
         "its losses are finite, but not the gradient of student.a and of 1 other parameters"),
        (lambda n, _: {"x": (n.a[0] - n.a[1]) * 3e38}, "the norm of its gradient overflows"),
    ],
)  # fmt: skip
def test_the_cause_of_a_lost_update_names_all_that_is_not_finite(losses: Losses, cause: str) -> None:
    loop = loop_of(losses, clip=1.0)
    loop.step(0)
    (lost,) = loop.lost
    assert str(lost) == f"The update 'student' of step 1 was not applied: {cause}."


def at_steps(broken: set[int]) -> Losses:
    return lambda network, step: {"x": network.a.sum() * (torch.nan if step in broken else 1.0)}


def test_only_updates_lost_in_a_row_end_training() -> None:
    loop = loop_of(at_steps({0, 2, 4, 6, 7}), max_lost={"student": 2})
    for step in range(7):
        loop.step(step)
        assert len(loop.lost) == (step % 2 == 0)
    with pytest.raises(
        UserError,
        match=r"2 times in a row\. No checkpoint has .* lower learning rate of student, or",
    ):
        loop.step(7)


def test_an_update_that_reaches_no_parameter_is_an_error() -> None:
    loop = loop_of(lambda network, step: {})
    loop.roles = Roles({name: loop.roles["student"] for name in ("student", "other")})
    loop.objective = Objective((replace(loop.objective.updates[0], roles=("student", "other")),))
    message = "'student' reached no parameter of student, other: is input_grad=True missing in an evaluation"
    with pytest.raises(RuntimeError, match=message):
        loop.step(0)


def test_the_error_of_many_lost_updates_names_all_roles() -> None:
    loop = loop_of(at_steps({0}), max_lost={"student": 1})
    loop.roles = Roles({name: loop.roles["student"] for name in ("student", "other")})
    loop.objective = Objective((replace(loop.objective.updates[0], roles=("student", "other")),))
    with pytest.raises(UserError, match=r"a lower learning rate of student, other, or"):
        loop.step(0)


@dataclass(frozen=True)
class Twins(World):
    """Two processes, of which the other has zeros everywhere."""

    rank: int = 1
    size: int = 2

    def sum_(self, tensors: list[Tensor]) -> None:
        assert all(isinstance(tensor, Tensor) for tensor in tensors)

    def gather_if_different(self, value: Any) -> list[Any]:
        return [value]


class Unlike(Twins):
    """The other one's micro-batches reached b alone, and logged and counted something else."""

    def gather_if_different(self, value: Any) -> list[Any]:
        return [([False, True, False], ["other", "loss/x"], {"other": ((2,), "torch.int64")}), value]

    def sum_(self, tensors: list[Tensor]) -> None:
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors), "each has a sum of its own"
        summed.append([tuple(tensor.shape) for tensor in tensors])


summed: list[list[tuple[int, ...]]] = []


def test_processes_that_reach_log_and_count_other_things_add_up_what_has_one_name() -> None:
    seen: list[dict[str, Tensor]] = []
    loop = loop_of(
        lambda n, _: {"x": n.a.sum()}, after=lambda _, totals: seen.append(dict(totals)), accumulate=2, world=Unlike()
    )
    summed.clear()
    metrics = loop.step(0)
    network = loop.roles["student"].module
    assert torch.equal(network.b.grad, torch.zeros_like(network.b))
    shape = tuple(network.a.shape)
    assert summed[0] == 6 * [()], "values and counts of other, loss/x and steps"
    assert summed[1:] == [[(2,), ()], [shape, tuple(network.b.shape)]]
    assert [name for name in metrics if name != "grad_norm/student"] == ["other", "loss/x", "steps"]
    assert list(seen[0]) == ["other", "images"]
    assert seen[0]["other"].dtype == torch.int64


def test_gradients_and_metrics_are_means_and_totals_sums_over_the_processes() -> None:
    seen: list[tuple[tuple[object, ...], torch.device, dict[str, float]]] = []

    def after(random: KeyedRandom, totals: Mapping[str, Tensor]) -> None:
        seen.append((random.key, random.device, {name: total.item() for name, total in totals.items()}))

    device = torch.device("cpu")
    loop = loop_of(lambda n, _: {"x": n.a.sum()}, after=after, accumulate=2, world=Twins(), seed=7, device=device)
    metrics = loop.step(5)
    assert metrics["grad_norm/student"].item() == pytest.approx(0.5 * 2**0.5)
    assert metrics["steps"].item() == pytest.approx(5.0), "sums and counts are divided alike"
    assert seen == [((7, 5, "after/student", 0), device, {"images": 3.0})]
    parameter = loop.roles["student"].parameters[0]
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.5))


def test_tensors_are_summed_in_groups_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of all gradients at once would double their memory. A larger tensor is a group of its own."""
    sizes: list[int] = []

    def all_reduce(flat: Tensor) -> None:
        sizes.append(flat.numel())
        flat *= 3

    monkeypatch.setattr(processes, "GROUP", 10)
    monkeypatch.setattr(processes.dist, "all_reduce", all_reduce)
    tensors = [torch.full((n,), float(n)) for n in (4, 2, 4, 1, 25, 3)]
    tensors += [torch.ones(2, 2, dtype=torch.bfloat16)]
    World(0, 2).mean_(tensors)
    assert sizes == [10, 1, 25, 3, 4]
    for n, tensor in zip((4, 2, 4, 1, 25, 3), tensors, strict=False):
        assert tensor.tolist() == [1.5 * n] * n
    assert tensors[-1].tolist() == [[1.5, 1.5], [1.5, 1.5]]
