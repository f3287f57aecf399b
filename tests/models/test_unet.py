"""The U-Net: its size, its inputs, and gradients of every weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.models.condition import Condition
from fewstep.models.unet import UNet, sinusoid

TINY = {"widths": (8, 16), "blocks": (1, 1), "embedding": 8, "heads": 2}
X_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
LABELS = Condition.of_labels(torch.tensor([0, 1, 2]), 3)


def perturbed(network: nn.Module) -> nn.Module:
    """Perturbs every weight: zero-initialised layers hide the rest of a new network."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def test_the_bundled_configuration_has_at_most_700_000_parameters() -> None:
    network = UNet(channels=1, classes=10, widths=(48, 96), blocks=(2, 2), embedding=64)
    assert sum(parameter.numel() for parameter in network.parameters()) <= 700_000


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (1, 8, 8)),
        ({"patch": 1}, (1, 8, 12)),
        ({"channels": 3}, (3, 28, 28)),
        ({"widths": (8, 8, 16), "blocks": (1, 2, 1)}, (1, 16, 8)),
    ],
)
def test_images_keep_their_shape(settings: dict[str, object], shape: tuple[int, ...]) -> None:
    network = perturbed(UNet(**{"classes": 3, **TINY, **settings}))
    assert network(torch.zeros(3, *shape), T, LABELS).shape == (3, *shape)


def test_a_new_network_ignores_its_inputs() -> None:
    outputs = UNet(classes=3, **TINY)(X_T, T, LABELS)
    assert outputs[1:].equal(outputs[:1].expand(2, -1, -1, -1))


@pytest.mark.parametrize("change", ["x_t", "t", "labels", "null"])
def test_every_input_changes_the_output(change: str) -> None:
    network = perturbed(UNet(classes=3, **TINY))
    others = {
        "x_t": (X_T + 0.1, T, LABELS),
        "t": (X_T, T + 0.05, LABELS),
        "labels": (X_T, T, Condition.of_labels(torch.tensor([1, 2, 0]), 3)),
        "null": (X_T, T, LABELS.null()),
    }
    difference = (network(*others[change]) - network(X_T, T, LABELS)).flatten(1).norm(dim=1)
    assert (difference > 1e-3).all()


def test_skip_connections_bypass_the_middle() -> None:
    network = perturbed(UNet(classes=3, **TINY))
    nn.init.zeros_(network.down[0][-1].weight)  # the middle receives nothing of x_t
    assert (network(X_T + 0.1, T, LABELS) - network(X_T, T, LABELS)).abs().max() > 1e-3


def test_samples_in_a_batch_are_independent() -> None:
    network = perturbed(UNet(classes=3, **TINY))
    together = network(X_T, T, LABELS)
    for i in range(3):
        row = slice(i, i + 1)
        torch.testing.assert_close(network(X_T[row], T[row], LABELS.index(row)), together[row])


def test_a_network_without_classes_needs_no_labels() -> None:
    assert perturbed(UNet(classes=0, **TINY))(X_T, T, Condition()).shape == X_T.shape


def test_gradients_reach_every_parameter() -> None:
    network = perturbed(UNet(classes=3, **TINY))
    network(X_T, T, LABELS).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        used = parameter.grad[:3] if name == "labels.weight" else parameter.grad  # the null label was not used
        assert used.flatten(1).any(1).all() if used.ndim > 1 else used.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_times_keep_their_precision_in_a_low_precision_network(dtype: torch.dtype) -> None:
    """bfloat16 has 3 digits: t = .9000 and .9010 would coincide. The features are computed from float64 times."""
    received: list[Tensor] = []
    network = UNet(classes=3, **TINY).to(dtype)
    network.time.register_forward_pre_hook(lambda module, inputs: received.append(inputs[0]))
    t = torch.tensor([0.9, 0.901, 0.5], dtype=torch.float64)
    network(X_T.to(dtype), t, LABELS)
    torch.testing.assert_close(received[0], sinusoid(t, 64).to(dtype))
    assert (received[0][0] - received[0][1]).abs().max() > 0.5
