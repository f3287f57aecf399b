"""A user's own objective and data source. Configs name them ``own_objective:Shrink`` and ``own_objective:Labelled``."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.data.batch import Batch
from fewstep.distill.roles import Roles
from fewstep.distill.stage import ObjectiveConfig, StageContext
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.condition import Condition

built: list[StageContext] = []


class Shrink(ObjectiveConfig):
    """Shrinks what the student predicts: min strength |x0|^2."""

    strength: float

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"student"})

    def build(self, roles: Roles, stage: StageContext) -> Objective:
        built.append(stage)

        def student(micro: MicroBatch) -> Iterator[LossTerm]:
            noise = micro.random.normal((micro.batch.size, *micro.batch.shape))
            x0 = roles.predict("student", noise, 1.0, micro.batch.condition).out.x0
            yield LossTerm("shrink", self.strength * x0.square().mean())

        return Objective((Update("student", ("student",), student),))


class Labelled:
    """A source of the one label ``label`` among ten."""

    def __init__(self, label: int) -> None:
        self.label = label

    def __call__(self, random: KeyedRandom, size: int) -> Batch:
        return Batch(size, (1, 8, 8), Condition.of_labels(torch.full((size,), self.label), 10))
