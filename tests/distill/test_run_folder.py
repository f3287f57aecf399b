"""A run folder: resuming is not stopping, any step replays, several processes are one, nothing is overwritten."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from fewstep.distill.run import Interrupted, Run, replay_step
from several_processes import one_of_several
from torch import Tensor
from worlds import state_of, tiny_config

from fewstep.api.bench_cost import evaluations_of
from fewstep.core.errors import UserError
from fewstep.distill.checkpoint import checkpoints, read_checkpoint
from fewstep.distill.config import dump_config, parse_config
from fewstep.models.loading import load_model

CPU = torch.device("cpu")


def make(folder: Path, **changes: object) -> Run:
    return Run.create(parse_config(tiny_config(folder, **changes), "test"), CPU)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_what_it_promises(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.train()
    folder = tmp_path / "run"
    assert {file.name for file in folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "student",
    }  # fmt: skip
    assert [line["step"] for line in metrics(folder)] == list(range(1, 13))
    assert json.loads((folder / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    student = load_model(folder / "student")
    assert student.config.few_step.times == (1.0, 0.5)
    saved = student.denoiser.backbone.state_dict()
    with run.roles["student"].averaged():
        averaged = run.roles.denoiser("student").backbone.state_dict()
        assert all(torch.equal(averaged[name], value) for name, value in saved.items())


def test_resuming_at_a_random_step_equals_not_stopping_bit_for_bit(tmp_path: Path) -> None:
    whole = make(tmp_path / "a")
    whole.train()
    stop = random.Random(7).randrange(1, 12)
    part = make(tmp_path / "b", checkpoint={"every": stop})

    def interrupt(run: Run, values: dict[str, float]) -> None:
        if run.step == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=f"step {stop} of 12"):
        part.train(progress=interrupt)
    resumed = Run.reopen(tmp_path / "b" / "run", CPU)
    assert resumed.step == stop
    resumed.train()
    assert same(state_of(whole), state_of(resumed))
    drop = ("seconds",)
    lines = [[{k: v for k, v in line.items() if k not in drop} for line in metrics(tmp_path / x / "run")] for x in "ab"]
    assert lines[0] == lines[1]


def test_evaluations_are_counted_as_the_networks_see_them(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    raw["stages"][0]["objective"]["guidance"] = 2.0  # type: ignore[index]
    run = Run.create(parse_config(raw, "test"), CPU)
    calls = evaluations_of(run, lambda: run.advance(3))
    assert run.evaluations == sum(len(call.x) for call in calls) > 0
    assert any(len(call.x) == 2 * run.config.batch for call in calls), "guided reads are among them"
    run.train()
    assert metrics(tmp_path / "run")[-1]["evaluations"] == run.evaluations


def test_every_logged_step_replays_bit_for_bit(tmp_path: Path) -> None:
    make(tmp_path).train()
    for step in range(1, 13):
        recorded, computed = replay_step(tmp_path / "run", step, CPU)
        assert recorded == computed
        assert recorded["loss/match"] > 0
    with pytest.raises(UserError, match="Step 13 was not logged"):
        replay_step(tmp_path / "run", 13, CPU)


def test_the_log_has_every_update_though_some_never_fall_on_a_logged_step(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, log_every=2)
    raw["stages"][0]["objective"]["critic_updates"] = 2  # type: ignore[index]
    Run.create(parse_config(raw, "test"), CPU).train()
    for line in metrics(tmp_path / "run"):
        assert {"loss/match", "loss/critic"} <= set(line)
    recorded, computed = replay_step(tmp_path / "run", 6, CPU)
    assert recorded == computed
    assert "loss/match" not in computed, "the student learned at the step before"


def test_a_cosine_ends_at_zero_for_the_role_that_learns_less_often_too(tmp_path: Path) -> None:
    """A student at half the updates once kept half its rate to the end, while its fake's was gone: quality fell."""
    raw = tiny_config(tmp_path)
    stage = raw["stages"][0]  # type: ignore[index]
    stage["objective"]["critic_updates"] = 3
    for role in stage["roles"].values():
        role["decay"] = "cosine"
    run = Run.create(parse_config(raw, "test"), CPU)
    run.train()
    assert (run.roles["student"].updates, run.roles["fake"].updates) == (4, 12)
    for role in ("student", "fake"):
        assert run.roles[role].rate(run.roles[role].updates) == pytest.approx(0)
        assert run.roles[role].rate(0) == 1


def test_two_processes_equal_two_accumulated_shards(tmp_path: Path) -> None:
    """2 gloo processes x b against 1 process x 2 micro-shards of b: 1e-6 after 20 updates."""
    steps = 20
    raw = tiny_config(tmp_path, batch=4, accumulate=2)
    raw["stages"][0]["steps"] = steps  # type: ignore[index]
    one = Run(parse_config(raw, "test"), tmp_path / "one", CPU)
    for step in range(steps):
        one.loop.step(step)
    port = 20_000 + os.getpid() % 20_000
    torch.multiprocessing.spawn(one_of_several, args=(2, str(tmp_path), port, steps), nprocs=2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, value in state_of(one).items():
        if "/optimizer/" not in name:
            assert torch.allclose(value.double(), two[name].double(), atol=1e-6), name


def test_checkpoints_keep_the_last_few_and_are_whole(tmp_path: Path) -> None:
    make(tmp_path, checkpoint={"every": 1, "keep": 3}).train()
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in kept] == ["step-0000010", "step-0000011", "step-0000012"]
    tensors, record = read_checkpoint(kept[-1])
    assert record["step"] == 12
    assert tensors["student/updates"] == 12


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_serves(tmp_path: Path) -> None:
    make(tmp_path).train()
    *_, before, last = checkpoints(tmp_path / "run" / "checkpoints")
    with (last / "state.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"xxxxx")
    with pytest.raises(UserError, match=rf"{last.name}.*damaged.*Delete"):
        Run.reopen(tmp_path / "run", CPU)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert Run.reopen(tmp_path / "run", CPU).step == int(before.name.removeprefix("step-"))


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    make(tmp_path).train()
    file = checkpoints(tmp_path / "run" / "checkpoints")[-1] / "state.json"
    state = json.loads(file.read_text())
    del state["evaluations"]
    file.write_text(json.dumps(state))
    with pytest.raises(UserError, match="lacks 'evaluations': another version of fewstep wrote it"):
        Run.reopen(tmp_path / "run", CPU)


def test_a_full_disk_while_writing_a_checkpoint_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def after_six(run: Run, values: dict[str, float]) -> None:
        if run.step == 6:
            monkeypatch.setattr("fewstep.models.loading.save_file", full)

    with pytest.raises(UserError, match="No space left on device"):
        run.train(progress=after_six)
    monkeypatch.undo()
    resumed = Run.reopen(tmp_path / "run", CPU)
    assert resumed.step == 4
    resumed.train()
    whole = make(tmp_path / "whole")
    whole.train()
    assert same(state_of(resumed), state_of(whole))


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"not empty.*--resume"):
        make(tmp_path)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_best_student_is_kept_and_saved(tmp_path: Path) -> None:
    """Validation values fall, then rise: the student of the lowest one is what the run delivers."""
    values = iter([5.0, 3.0, 4.0])
    run = make(tmp_path, validation={"every": 4, "n": 10})
    run.train(validate=lambda student, config, step: next(values))
    assert run.best == {"value": 3.0, "step": 8}
    at_eight = Run.reopen(tmp_path / "run", CPU, before=8)
    with at_eight.roles["student"].averaged():
        expected = at_eight.roles.denoiser("student").backbone.state_dict()
        saved = load_model(tmp_path / "run" / "student").denoiser.backbone.state_dict()
        assert all(torch.equal(expected[name], value) for name, value in saved.items())


def test_tensorboard_gets_the_logged_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make(tmp_path, tensorboard=True).train()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("loss/match")}
    logged = {line["step"]: line["loss/match"] for line in metrics(tmp_path / "run")}
    assert written == pytest.approx(logged)


def test_stages_hand_their_roles_on(tmp_path: Path) -> None:
    """8 -> 4 in small: the second stage starts its student from the first one's average, frozen copies stay."""
    stage = {
        "steps": 5,
        "objective": {"name": "dmd2", "steps": 4, "critic_updates": 1},
        "roles": {"student": {"lr": 1e-3, "ema": 0.5}, "fake": {"lr": 1e-3}},
    }
    second = {
        **stage,
        "objective": {"name": "dmd2", "steps": 2, "critic_updates": 1},
        "roles": {"student": {"init": "student", "lr": 1e-9}, "fake": {"lr": 1e-3}},
        "freeze": {"reference": "student"},
    }
    run = make(tmp_path, stages=[stage, second], checkpoint={"every": 3, "keep": 9})
    averages: list[dict[str, Tensor]] = []

    def watch(run: Run, values: dict[str, float]) -> None:
        if run.step == 5:
            averages.append({k: v.clone() for k, v in run.roles["student"].average.items()})

    run.train(progress=watch)
    reference = dict(run.roles["reference"].module.named_parameters())
    assert all(torch.equal(reference[name], value) for name, value in averages[0].items())
    assert load_model(tmp_path / "run" / "student").config.few_step.times == (1.0, 0.5)
    resumed = Run.reopen(tmp_path / "run", CPU, before=9)
    assert (resumed.step, resumed.stage) == (9, 1)
    resumed.train()
    assert same(state_of(run), state_of(resumed))
    frozen = resumed.roles["reference"].module.state_dict()
    assert all(torch.equal(frozen[k], v) for k, v in run.roles["reference"].module.state_dict().items())


def test_config_round_trip(tmp_path: Path) -> None:
    config = parse_config(tiny_config(tmp_path), "test")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    from fewstep.distill.config import load_config

    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bach": 3}, "unknown key 'bach'; did you mean 'batch'"),
        ({"batch": 0}, "batch = 0: input should be greater than or equal to 1"),
        ({"batch": "many"}, "batch = 'many': input should be a valid integer"),
        ({"teacher": None}, "give either teacher .* or model"),
        ({"stages": []}, "stages = .*at least 1"),
    ],
)
def test_mistakes_name_key_value_and_the_nearest_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(tiny_config(tmp_path, **change), "a.yaml")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("objective", "guidence"), 3.0, "a.yaml: unknown key 'stages.0.objective.guidence'; did you mean 'guidance'"),
        (("objective", "name"), "tmd", "stages.0.objective.name: Unknown objective 'tmd'; did you mean 'tdm'"),
        (("objective", "steps"), 0, "stages.0.objective.steps = 0: input should be greater"),
        (("roles", "student", "learning_rate"), 1, "unknown key 'stages.0.roles.student.learning_rate'"),
        (("roles", "student", "lr"), -1, "stages.0.roles.student.lr = -1"),
    ],
)
def test_mistakes_below_the_stages_do_too(tmp_path: Path, path: tuple[str, ...], value: object, message: str) -> None:
    raw = tiny_config(tmp_path)
    node = raw["stages"][0]  # type: ignore[index]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(UserError, match=message):
        parse_config(raw, "a.yaml")


def test_roles_that_are_missing_or_unknown_are_named(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path)
    del raw["stages"][0]["roles"]["fake"]  # type: ignore[index]
    with pytest.raises(UserError, match=r"needs the roles .*but \['fake'\] is not there"):
        Run.create(parse_config(raw, "a.yaml"), CPU)
    raw = tiny_config(tmp_path)
    raw["stages"][0]["roles"]["student"]["init"] = "techer"  # type: ignore[index]
    with pytest.raises(UserError, match=r"starts from 'techer'.*did you mean 'teacher'"):
        Run.create(parse_config(raw, "a.yaml"), CPU)
