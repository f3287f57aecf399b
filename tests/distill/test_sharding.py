"""Several processes, whole and split: equal to one process that accumulates; resuming on another number of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from several_processes import CASES, differences, train_to
from tiny_pipelines import TINY
from tiny_runs import settings
from torch import nn

from fewstep.core.errors import UserError
from fewstep.core.files import write_tensors
from fewstep.distill.checkpoint import StoredTensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.sharding import groups
from fewstep.models.loading import load_model


@pytest.mark.parametrize(
    "names",
    [("tdm, small student beside adapters", "cdm"), pytest.param(tuple(CASES), marks=pytest.mark.long)],
    ids=["two", "all"],
)
def test_processes_equal_one_that_accumulates_split_or_not_and_resume_on_any_number(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    found = differences(tmp_path, names)
    assert {(one["method"], one["networks"]) for one in found} == {(n, k) for n in names for k in ("whole", "split")}
    for one in found:
        assert one["weights moved by"] > 1e-2, one
        assert one["largest difference"] < 1e-6, one
    parts = [path.name for path in (tmp_path / "cdm" / "run, split" / "checkpoints").glob("step-0000020/*.safetensors")]
    assert sorted(parts) == [f"state-{k:05d}-of-00004.safetensors" for k in range(1, 5)]


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart", "sd3", "flux", "qwen_image", "wan"])
def test_the_groups_of_a_network_have_each_parameter_once_and_the_root_none_of_its_layers(
    tmp_path: Path, family: str
) -> None:
    TINY[family].build().save_pretrained(tmp_path)
    network = load_model(tmp_path).denoiser.backbone
    found = list(groups(network))
    covered: dict[int, int] = {}
    for group in found:
        inner = {
            id(p) for other in found if other is not group and other in set(group.modules()) for p in other.parameters()
        }
        for parameter in group.parameters():
            covered[id(parameter)] = covered.get(id(parameter), 0) + (id(parameter) not in inner)
    assert set(covered.values()) == {1}
    outside = [name for name, p in network.named_parameters() if id(p) not in covered]
    assert all("." not in name.removeprefix("network.").removeprefix("transformer.") for name in outside), outside
    assert len(found) > 3


def test_a_group_is_divided_where_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network = nn.Module()
    network.first, network.blocks = nn.Linear(2, 2), nn.ModuleList([block])
    assert list(groups(network)) == [network.first, block]
    monkeypatch.setattr("fewstep.distill.sharding.GROUP", 30)
    assert list(groups(network)) == [network.first, block[0], block[1], block]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": True}, "shard and offload both save"),
        ({"weights": "int8", "adapters": {"rank": 2}}, "shard splits floating-point weights"),
        ({"optimizer": "adamw8bit"}, "not those of adamw8bit"),
        ({"full_finetune": True, "adapters": {"rank": 2}}, "no role can have full_finetune"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    raw = settings("tdm", tmp_path, "cpu", "float32") | {"shard": True}
    role = {name: changes.pop(name) for name in ("optimizer", "full_finetune") if name in changes}
    raw["stages"][0]["roles"]["fake"] |= role
    with pytest.raises(UserError, match=message):
        parse_config(raw | changes, "test")


def test_one_process_has_nothing_to_split(tmp_path: Path) -> None:
    raw = settings("tdm", tmp_path, "cpu", "float32") | {"health": {"every": 0}}
    split = train_to(3, {"a": raw | {"shard": True, "out": str(tmp_path / "a")}})["a"]
    plain = train_to(3, {"b": raw | {"out": str(tmp_path / "b")}})["b"]
    assert all(torch.equal(split[name], plain[name]) for name in plain)


@pytest.mark.parametrize("shape", [(3, 3), (5, 3), (4, 2)])
def test_a_split_tensor_of_another_shape_is_refused_as_a_whole_one_is(shape: tuple[int, int], tmp_path: Path) -> None:
    """A network of one's own that changed since: its rows that a checkpoint has would be read, and others left."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    file = tmp_path / "state.safetensors"
    write_tensors({"right": torch.arange(12.0).reshape(4, 3), "wrong": torch.ones(shape)}, file)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        split = DTensor.from_local(torch.zeros(2, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
        StoredTensors({file: {}}).fill("right", split)
        assert torch.equal(split.to_local(), torch.arange(6.0).reshape(2, 3))
        with pytest.raises(ValueError, match=rf"wrong is \[{shape[0]}, {shape[1]}\] in the checkpoint, and \[4, 3\]"):
            StoredTensors({file: {}}).fill("wrong", split)
    finally:
        dist.destroy_process_group()
