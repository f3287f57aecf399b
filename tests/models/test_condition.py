"""Conditions: named tensors with one batch axis, and the values that mean no condition."""

from __future__ import annotations

import pytest
import torch

from fewstep.models.condition import Condition


def example() -> Condition:
    """Three samples: a prompt, which guidance may drop, and a step count, which it may not."""
    return Condition(
        {"prompt": torch.arange(12.0).reshape(3, 2, 2), "steps": torch.tensor([4, 2, 1])},
        {"prompt": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]])},
    )


def test_null_replaces_names_with_a_null_value_and_keeps_the_others() -> None:
    null = example().null()
    assert null["prompt"].tolist() == [[[-1, -2], [-3, -4]]] * 3
    assert null["steps"].tolist() == [4, 2, 1]


def test_null_of_marked_samples_leaves_the_others_alone() -> None:
    condition = example()
    dropped = condition.null(torch.tensor([True, False, True]))
    prompt = dropped["prompt"]
    assert prompt[[0, 2]].tolist() == [[[-1, -2], [-3, -4]]] * 2
    assert prompt[1].equal(condition["prompt"][1])
    assert condition["prompt"][0, 0, 1] == 1, "the original is unchanged"


def test_the_null_label_is_the_number_of_classes() -> None:
    condition = Condition.of_labels(torch.tensor([3, 0]), classes=10)
    assert condition.null()["labels"].tolist() == [10, 10]
    assert condition.null()["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("rows", "steps"),
    [
        (slice(1, None), [2, 1]),
        (torch.tensor([2, 0]), [1, 4]),
        (torch.tensor([True, False, True]), [4, 1]),
    ],
)
def test_index_selects_samples_and_keeps_the_null_values(rows: slice | torch.Tensor, steps: list[int]) -> None:
    part = example().index(rows)
    assert part["steps"].tolist() == steps
    assert part["prompt"].equal(example()["prompt"][rows])
    assert part.null()["prompt"][0].tolist() == [[-1, -2], [-3, -4]]


def test_cat_concatenates_both_branches_of_guidance() -> None:
    condition = example()
    both = Condition.cat(condition, condition.null())
    assert both["steps"].tolist() == [4, 2, 1, 4, 2, 1]
    assert both.index(slice(0, 3))["prompt"].equal(condition["prompt"])
    assert both.index(slice(3, 6))["prompt"].equal(condition.null()["prompt"])


def test_replace_adds_or_changes_values_in_a_copy() -> None:
    condition = example()
    changed = condition.replace(steps=torch.ones(3), mask=torch.zeros(3, 2))
    assert set(changed) == {"prompt", "steps", "mask"}
    assert changed["steps"].tolist() == [1, 1, 1]
    assert changed.null()["prompt"].equal(condition.null()["prompt"])
    assert condition["steps"].tolist() == [4, 2, 1]


def test_to_moves_values_and_null_values() -> None:
    moved = example().to("meta")
    assert {value.device.type for value in [*moved.tensors.values(), *moved.nulls.values()]} == {"meta"}


def test_the_null_of_an_empty_condition_is_empty() -> None:
    assert len(Condition()) == len(Condition().null()) == 0


def test_inconsistent_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"null values for names .* \['labels'\]"):
        Condition({}, {"labels": torch.tensor(10)})
    with pytest.raises(ValueError, match=r"one batch size, got {'a': 2, 'b': 3}"):
        Condition({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="cannot concatenate conditions with different names"):
        Condition.cat(example(), Condition.of_labels(torch.zeros(3), 10))
    with pytest.raises(KeyError):
        example()["labels"]
