"""The network that the objectives of this folder start from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from plane import PlaneNetwork, data, flow_matching, loop_of, train, trained
from worlds import FLOW

from fewstep.distill.roles import Roles
from fewstep.distill.update import LossTerm, MicroBatch, Objective, Update
from fewstep.models.denoiser import Denoiser


@pytest.fixture(scope="module")
def base() -> Denoiser:
    """A network with a feature layer, trained by flow matching on the mixture: students and fakes start from it."""
    torch.manual_seed(0)
    denoiser = Denoiser(PlaneNetwork(), FLOW, "velocity", feature_layers=["hidden.2"])

    def student(micro: MicroBatch) -> Iterator[LossTerm]:
        yield LossTerm("flow", flow_matching(micro, micro.batch["x0"]).mean())

    objective = Objective((Update("student", ("student",), student),))
    train(loop_of(Roles({"student": trained(denoiser, 5e-3)}), objective, data=data), 500)
    return denoiser
