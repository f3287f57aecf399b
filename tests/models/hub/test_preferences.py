"""Preferences of prompts on diffusers pipelines: pairs of a model's own samples, training with them, win rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import refused, succeeds
from preference_tables import write_images, write_table
from tiny_pipelines import ADAPTERS, TINY, settings
from torch import Tensor

import fewstep
from fewstep.api.data import make_preferences
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.distill.config_files import parse_config
from fewstep.distill.run_folder import RunFolder
from fewstep.eval.rewards.brightness import brightness
from fewstep.models.adapters import AdapterView
from fewstep.models.hub.encoded import EncodedPrompts, read_index
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model
from fewstep.samplers.generate import generate
from fewstep.samplers.plan import SamplingConfig

pytest.importorskip("peft")
Saved = Callable[[str], Path]
CPU = torch.device("cpu")
LINES = ["a cat", "two dogs", "the sea"]
SAMPLING = SamplingConfig("euler", 1)


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(LINES) + "\n")
    return file


def made(saved: Saved, captions: Path, out: Path, name: str = "sd", **changes: Any) -> Path:
    """Pairs of a tiny pipeline's own samples."""
    chosen = {"reward": "brightness", "n": 5, "candidates": 3, "sampling": SAMPLING, "rows": 2, "device": "cpu"}
    make_preferences(saved(name), out, captions=captions, size=TINY[name].size, **(chosen | changes))
    return out


def dpo(saved: Saved, name: str, pairs: Path, out: Path, adapters: dict[str, Any] | None, **stage: Any) -> dict:
    raw = settings(saved(name), name, out, adapters, data={"kind": "prompts", "path": str(pairs)})
    raw["stages"] = [
        {
            "steps": 2, "objective": {"name": "diffusion_dpo", "beta": 100}, "roles": {"student": {"lr": 1e-3}},
            "freeze": {"reference": "teacher"}, **stage,
        }
    ]  # fmt: skip
    return raw


def contents(folder: Path) -> dict[str, Tensor]:
    [(latents, prompts)] = EncodedPrompts(folder).buckets
    return latents | {"prompt": prompts}


# ---- pairs


def test_winner_and_loser_are_the_best_and_worst_of_a_prompts_samples(
    saved: Saved, captions: Path, tmp_path: Path
) -> None:
    """Pair k has prompt k modulo their number, and candidates with the noises k, k + n, ..., here one by one."""
    found = contents(made(saved, captions, tmp_path / "out"))
    assert found["prompt"].tolist() == [0, 1, 2, 0, 1]
    model, folder = load_model(saved("sd"), size=TINY["sd"].size), PipelineFolder.open(saved("sd"))
    pipeline = folder.pipeline()
    for k in range(5):
        condition = folder.condition(pipeline, [LINES[k % 3]])
        samples = torch.cat([generate(model, condition, SAMPLING, numbers=[k + 5 * c]).x0 for c in range(3)])
        rewards = brightness(None, folder.decode_images(pipeline, samples), None)  # type: ignore[arg-type]
        assert rewards.unique().numel() > 1
        torch.testing.assert_close(found["winner"][k], samples[rewards.argmax()], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["loser"][k], samples[rewards.argmin()], rtol=1e-3, atol=1e-3)


def test_pairs_without_a_preference_are_counted(
    saved: Saved, captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those of shards that an earlier call wrote."""
    command = [
        "data", "preferences", saved("sd"), "--captions", captions, "--reward", "preference_tables:prefers_cats",
        "--n", 5, "--candidates", 2, "--solver", "euler", "--steps", 1, "--size", "16x16", "--out", tmp_path / "out",
    ]  # fmt: skip
    for _ in range(2):
        printed = succeeds(*command)
        assert "5 pairs are in" in printed
        assert "In 3 of them all candidates have the same reward" in printed
    found = contents(tmp_path / "out")
    assert [bool(torch.equal(a, b)) for a, b in zip(found["winner"], found["loser"], strict=True)] == [
        text != "a cat" for text in (LINES * 2)[:5]
    ]


def test_pairs_are_keyed_and_continue(saved: Saved, captions: Path, tmp_path: Path) -> None:
    """Neither the batch nor the number of pairs in a shard changes them, and the same call continues."""
    done: list[int] = []
    out = made(saved, captions, tmp_path / "a", progress=done.append)
    assert done[-1] == 15
    assert done == sorted(done)
    first = contents(out)
    other = contents(made(saved, captions, tmp_path / "b", batch=1, rows=4))
    for name, value in first.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3)
    kept = (out / "pairs-00000.safetensors").stat().st_mtime_ns
    (out / "pairs-00001.safetensors").unlink()
    with pytest.raises(UserError, match="is incomplete"):
        EncodedPrompts(out)
    again = contents(made(saved, captions, out))
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert (out / "pairs-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    "change",
    [
        {"reward": "symmetry"}, {"candidates": 2}, {"n": 6}, {"sampling": SamplingConfig("euler", 2)},
        {"sampling": SamplingConfig("euler", 1, seed=1)},
    ],
)  # fmt: skip
def test_other_pairs_are_not_continued(saved: Saved, captions: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    out = made(saved, captions, tmp_path / "out")
    with pytest.raises(UserError, match="contains other prompts or samples"):
        made(saved, captions, out, **change)


def test_pairs_that_cannot_be_made_are_refused_before_sampling(
    saved: Saved, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.samplers.generate.integrate", lambda *a, **k: pytest.fail("it began"))
    out = tmp_path / "out"
    command = ["data", "preferences", saved("sd"), "--out", out, "--n", 2, "--solver", "euler", "--steps", 1]
    size = ["--size", "16x16"]
    assert "this one takes prompts" in refused(capsys, *command, "--reward", "symmetry")
    assert "Unknown prompt_reward 'confidence'" in refused(
        capsys, *command, "--reward", "confidence", "--captions", captions
    )
    label_model = ["data", "preferences", "fashion", "--out", out, "--n", 2, "--reward", "symmetry"]
    assert "takes class labels" in refused(capsys, *label_model, "--captions", captions)
    assert "does not exist. Give a text file" in refused(
        capsys, *command, "--reward", "symmetry", "--captions", tmp_path / "none.txt"
    )
    assert "has no few-step rule" in refused(
        capsys, *command, *size, "--reward", "symmetry", "--captions", captions, "--solver", "student"
    )
    assert "'a cat' is not a caption of a coloured garment" in refused(
        capsys, *command, *size, "--reward", "prompt", "--captions", captions
    )
    brightness_of = [*command, *size, "--reward", "brightness", "--captions", captions]
    assert "Cannot write /proc/none/index.json" in refused(capsys, *brightness_of, "--out", "/proc/none")
    assert "is a file; name a folder" in refused(capsys, *brightness_of, "--out", captions)
    wins = ["winrate", saved("sd"), saved("sd"), "--solver", "euler", "--steps", 1, "--n", 2]
    assert "'a cat' is not a caption" in refused(capsys, *wins, *size, "--captions", captions)
    assert "this one takes prompts" in refused(capsys, *wins)
    assert "Unknown prompt_reward 'confidence'" in refused(
        capsys, *wins, "--captions", captions, "--rewards", "symmetry,confidence"
    )
    assert not out.exists()


# ---- training


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
@pytest.mark.parametrize("name", list(TINY))
def test_every_family_learns_from_pairs(
    saved: Saved, name: str, adapters: dict[str, Any] | None, tmp_path: Path
) -> None:
    """The loss starts at log 2, so the reference is the student's start; only the student changes."""
    pairs, encoded = tmp_path / "pairs", saved(name) / "prompts"
    pairs.mkdir()
    for file in encoded.iterdir():
        (pairs / file.name).write_bytes(file.read_bytes())
    shape = PipelineFolder.open(saved(name)).family.shape(*TINY[name].size)
    winner, loser = torch.randn(2, 6, *shape, generator=torch.Generator().manual_seed(0))
    write_tensors({"winner": winner, "loser": loser, "prompt": torch.arange(6)}, pairs / "pairs-00000.safetensors")
    (pairs / "index.json").write_text(read_index(encoded).model_copy(update={"pairs": 6}).model_dump_json())
    run = RunFolder.create(parse_config(dpo(saved, name, pairs, tmp_path / "run", adapters), "test"), CPU)
    frozen = {
        (role, key): value.clone()
        for role in ("teacher", "reference")
        for key, value in run.trainer.roles.denoiser(role).state_dict().items()
    }
    start = {key: value.clone() for key, value in run.trainer.roles.denoiser("student").state_dict().items()}
    run.train()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss/dpo"] == pytest.approx(0.693147, abs=1e-5)
    for (role, key), value in frozen.items():
        assert torch.equal(run.trainer.roles.denoiser(role).state_dict()[key], value), f"{role} changed"
    after = run.trainer.roles.denoiser("student").state_dict()
    assert any(not torch.equal(after[key], value) for key, value in start.items())
    student = load_model(tmp_path / "run" / "student")
    assert isinstance(student.denoiser.backbone, AdapterView) == bool(adapters)


@pytest.mark.parametrize(
    ("name", "adapters", "lr"), [("sd", None, 5e-4), ("sd3", ADAPTERS, 1e-3), ("flux_schnell", None, 5e-4)]
)
def test_the_commands_make_pairs_learn_from_them_and_measure(
    saved: Saved, name: str, adapters: dict[str, Any] | None, lr: float, captions: Path, tmp_path: Path
) -> None:
    how = ["--solver", "euler", "--steps", 1, "--captions", captions, "--size", "16x16"]
    pairs, file = tmp_path / "pairs", tmp_path / "wins.json"
    succeeds("data", "preferences", saved(name), "--reward", "brightness", "--n", 48, *how, "--out", pairs)
    raw = dpo(saved, name, pairs, tmp_path / "run", adapters, steps=30, roles={"student": {"lr": lr}})
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(raw | {"batch": 8, "health": {"every": 0}}))
    succeeds("train", tmp_path / "dpo.yaml")
    succeeds(
        "winrate", tmp_path / "run", saved(name), "--n", 150, "--json", file, *how, "--rewards", "brightness,symmetry"
    )
    rates = {row["reward"]: row for row in json.loads(file.read_text())}
    assert set(rates) == {"brightness", "symmetry"}
    assert rates["brightness"]["low"] > 0.5
    assert rates["brightness"]["ours"] > rates["brightness"]["theirs"]


def test_a_table_of_images_is_encoded_and_learned_from(saved: Saved, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "pairs"
    write_images(images, {f"{k}.png": (16, 16) for k in range(4)})
    table = write_table(images / "pairs.csv", [("0.png", "1.png", "a cat"), ("2.png", "3.png", "two dogs")])
    succeeds("data", "encode", table, "--teacher", saved("flux"), "--out", out)
    raw = dpo(saved, "flux", out, tmp_path / "run", ADAPTERS) | {"size": [16, 16, 1]}
    raw["stages"][0]["objective"]["guidance"] = 3.5
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(raw))
    succeeds("train", tmp_path / "dpo.yaml")
    assert load_model(tmp_path / "run" / "student").config.lora is not None


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["copies", "adapters"])
def test_a_few_step_student_is_tuned_on_its_own_samples(
    saved: Saved, adapters: dict[str, Any] | None, captions: Path, tmp_path: Path
) -> None:
    first = fewstep.train(parse_config(settings(saved("sd"), "sd", tmp_path / "first", adapters), "test"))
    make_preferences(first, tmp_path / "pairs", reward="brightness", captions=captions, n=4, device="cpu")
    objective = {"name": "diffusion_dpo", "student_times": [1.0, 0.5]}
    raw = dpo(saved, "sd", tmp_path / "pairs", tmp_path / "run", adapters, objective=objective)
    run = fewstep.train(parse_config(raw | {"teacher": str(first / "student"), "size": None}, "test"))
    few_step = load_model(run / "student").config.few_step
    assert few_step is not None
    assert few_step.times == (1.0, 0.5)


def test_what_cannot_work_is_refused_before_training(saved: Saved, captions: Path, tmp_path: Path) -> None:
    pairs = made(saved, captions, tmp_path / "pairs")

    def message(raw: dict[str, Any]) -> str:
        with pytest.raises(UserError) as error:
            fewstep.train(parse_config(raw, "test"))
        assert not (tmp_path / "run").exists()
        return str(error.value)

    run = tmp_path / "run"
    assert "encoded by other text encoders" in message(dpo(saved, "sdxl", pairs, run, None))
    assert "does not exist. Create it with fewstep data encode" in message(dpo(saved, "sd", tmp_path, run, None))
    assert "needs ['loser', 'winner'] with each condition" in message(
        dpo(saved, "sd", saved("sd") / "prompts", run, None)
    )
    raw = dpo(saved, "sd", pairs, run, None)
    raw["stages"][0]["objective"] = {"name": "flow_matching"}
    del raw["stages"][0]["freeze"]
    assert "needs ['x0']" in message(raw)
    raw = dpo(saved, "sd", pairs, run, None)
    raw["stages"][0]["freeze"] = {}
    assert "'reference'] is missing" in message(raw)
    samples = {name: torch.zeros(4, 4, 8, 8) for name in ("winner", "loser")}
    write_tensors(samples | {"labels": torch.zeros(4, dtype=torch.int64)}, tmp_path / "labels.safetensors")
    raw = dpo(saved, "sd", pairs, run, None)
    raw["data"] = {"kind": "tensors", "path": str(tmp_path / "labels.safetensors")}
    assert "This teacher needs prompts: set data.kind=prompts" in message(raw)
    assert "takes class labels" in message(
        raw | {"data": {"kind": "prompts", "path": str(pairs)}, "teacher": "fashion", "size": None}
    )
    _condition(pairs, prompt=torch.zeros(1, 5, 8))
    assert "The conditions in" in message(dpo(saved, "sd", pairs, run, None))
    _condition(pairs, prompt=torch.zeros(1, 5, 32), pooled=torch.zeros(1, 32))
    assert "are pooled [32], prompt [5, 32], those of" in message(dpo(saved, "sd", pairs, run, None))
    _condition(pairs, prompt=torch.zeros(1, 5, 32))
    for file in pairs.glob("pairs-*.safetensors"):
        rows = len(read_tensors(file)["prompt"])
        _replace(pairs, file.stem, winner=torch.zeros(rows, 8, 8, 8), loser=torch.zeros(rows, 8, 8, 8))
    assert "winner in" in message(dpo(saved, "sd", pairs, run, None))


def _replace(folder: Path, name: str, **tensors: Tensor) -> None:
    file = folder / f"{name}.safetensors"
    write_tensors(read_tensors(file) | tensors, file)


def _condition(folder: Path, **null: Tensor) -> None:
    """Replaces the null condition, and that of each prompt by the same."""
    for file in (folder / "null.safetensors", *folder.glob("shard-*.safetensors")):
        rows = len(read_tensors(file)["prompt"])
        write_tensors({name: value.repeat(rows, *[1] * (value.ndim - 1)) for name, value in null.items()}, file)
