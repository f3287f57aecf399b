"""Compiled blocks compute the same, from a number of graphs that does not grow. The back end is torch's ``eager``: it
traces as the others do, and compiles nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import settings
from torch import nn

import fewstep
from fewstep.core.errors import UserError
from fewstep.distill.build import build_inputs
from fewstep.distill.config_files import parse_config
from fewstep.distill.trainer import Trainer
from fewstep.models.backbone import Backbone
from fewstep.models.compilation import compile_blocks, compiling, graphs
from fewstep.models.video_unet import TemporalAttention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("fewstep.distill.trainer.compile_blocks", partial(compile_blocks, backend="eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def losses(raw: dict[str, Any], compiled: bool, steps: int) -> tuple[list[dict[str, float]], list[int]]:
    """The metrics of steps, and the number of graphs after each."""
    config = parse_config({**raw, "compile": compiled}, "test")
    trainer = Trainer(config, build_inputs(config, CPU), CPU)
    found, counted = [], []
    for _ in range(steps):
        found.append({name: x.item() for name, x in trainer.one_step().items() if name.startswith("loss/")})
        counted.append(graphs())
    return found, counted


def check(raw: dict[str, Any], most: int, steps: int = 3) -> None:
    plain, none = losses(raw, False, steps)
    compiled, counted = losses(raw, True, steps)
    assert compiled == plain
    assert none == [0] * steps
    assert 0 < counted[0] <= most
    assert counted == [counted[0]] * steps, "no step compiles again"


def test_a_bundled_network_with_a_gan_term_and_two_stages(tmp_path: Path) -> None:
    raw = settings("dmd2", tmp_path, "cpu", "float32", gan={"weight": 1.0}, critic_updates=1)
    check(raw, 20)
    later = {**raw["stages"][0], "roles": {name: {"lr": 1e-3, "init": "keep"} for name in raw["stages"][0]["roles"]}}
    _, counted = losses(raw | {"stages": [raw["stages"][0], later]}, True, 6)
    assert counted[3:] == [counted[3]] * 3
    assert counted[3] <= counted[0] + 4, "roles of a later stage share most graphs"


@pytest.mark.parametrize(("name", "lora", "most"), [("wan", False, 4), ("wan", True, 9), ("flux", True, 18)])
def test_pipelines(name: str, lora: bool, most: int, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import tiny_pipelines

    tiny_pipelines.TINY[name].build().save_pretrained(tmp_path / "teacher")
    tiny_pipelines.write_embeddings(name, tmp_path / "teacher")
    adapters = tiny_pipelines.ADAPTERS if lora else None
    check(tiny_pipelines.settings(tmp_path / "teacher", name, tmp_path / "run", adapters), most, steps=2)


class OverFrames(Backbone):
    """Attention over the frames of clips, with all weights in use."""

    repeated_blocks = ("TemporalAttention",)

    def __init__(self) -> None:
        super().__init__()
        self.block = TemporalAttention(8, 2, context=None)
        for parameter in self.parameters():
            nn.init.normal_(parameter)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler of C++")
def test_blocks_of_one_kind_at_several_resolutions_are_compiled() -> None:
    """By torch's own back end, which in 2.13 fails for a convolution whose input may have any height and width."""
    network = OverFrames()
    clips = [torch.randn(batch, 8, 3, size, size) for batch, size in ((2, 4), (3, 4), (3, 8))]
    with torch.no_grad():
        plain = [network.block(clip) for clip in clips]
        compile_blocks(network, "inductor")
        for clip, expected in zip(clips, plain, strict=True):
            assert network.block(clip).sub(expected).abs().max() < 1e-3 * expected.abs().max()
    assert graphs() == 3, "one for the first batch, one for any batch, one for the other size"


def test_a_network_without_named_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="compile: true has no effect on a Linear"):
        compile_blocks(nn.Linear(2, 2))


def test_a_failure_of_the_compiler_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: object, inputs: object) -> None:
        raise ValueError("no code for this")

    monkeypatch.setattr("fewstep.distill.trainer.compile_blocks", partial(compile_blocks, backend=fails))
    raw = settings("tdm", tmp_path, "cpu", "float32") | {"compile": True}
    with pytest.raises(UserError, match=r"could not compile a block of the network.*Set compile=false"):
        fewstep.train(parse_config(raw, "test"))
    with pytest.raises(RuntimeError, match="mine"), compiling():
        raise RuntimeError("mine")
