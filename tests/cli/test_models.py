"""Commands that use and measure models: sample, eval, compare, and the files they cannot read or write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from commands import fewstep, refused, succeeds, write_config
from PIL import Image
from worlds import tiny_teacher

from fewstep.api import data, solvers
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors, write_tensors
from fewstep.models.loading import load_model
from fewstep.samplers.plan import SamplingConfig, plan


def test_an_image_depends_only_on_its_seed(finished: Path, tmp_path: Path) -> None:
    images = []
    for name, seed, run in (("a", 0, succeeds), ("b", 0, fewstep), ("c", 1, succeeds)):  # the second in a new process
        file = tmp_path / name
        run("sample", finished, "--steps", 2, "--labels", "0,1,2", "--n", 6, "--seed", seed, "--out", file)
        images.append(file.read_bytes())
    assert images[0] == images[1] != images[2]
    with Image.open(tmp_path / "a") as image:
        assert image.size == (3 * 48 + 2, 2 * 48 + 1), "enlarged to 48 pixels"


def test_a_missing_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", write_config(tmp_path), "teacher=fashon")
    assert "No model at 'fashon'" in message
    assert "did you mean 'fashion'" in message


def test_corrupt_and_foreign_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_config(tmp_path)
    weights = tmp_path / "teacher" / "model.safetensors"
    intact = weights.read_bytes()
    weights.write_bytes(intact[: len(intact) // 2])
    assert f"{weights} is not a readable safetensors file" in refused(capsys, "train", file)
    write_tensors({"something": torch.zeros(3)}, weights)
    assert "does not belong to this network" in refused(capsys, "train", file)
    weights.write_bytes(intact)
    tensors = read_tensors(weights)
    tensors["enter.weight"] = tensors["enter.weight"][:2]
    write_tensors(tensors, weights)
    message = refused(capsys, "train", file)
    assert "enter.weight has shape" in message
    assert "the network needs" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "eular", "--steps", "4"], "Unknown solver 'eular'; did you mean 'euler'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--labels", "3,10"], "The model has no class '10'; it has 0 to 9."),
        (["--labels", "shoe"], "The model has no class 'shoe'; it has 0 to 9."),
        (["--n", "0"], "n must be at least 1"),
        (["--device", "cpuu"], "Unknown device 'cpuu'; did you mean 'cpu'"),
        (["--out", "/proc/none/grid.png"], "Cannot write /proc/none/grid.png"),
    ],
)
def test_sample_refuses_bad_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    assert message in refused(capsys, "sample", teacher, "--out", tmp_path / "x.png", *arguments)
    assert not (tmp_path / "x.png").exists()


def test_a_teacher_has_no_student_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    assert "not a distilled student" in refused(capsys, "sample", teacher, "--solver", "student", "--steps", "4")


def test_scores_are_merged_into_their_file_and_files_are_compared(squares: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    command = ["eval", tiny_teacher(tmp_path / "teacher"), "--reference", squares, "--json", file]
    succeeds(*command, "--n", 100, "--nfe", 4, "--guidance", "1,2", "--solver", "euler")
    scores = json.loads(file.read_text())
    assert {(score["nfe"], score["steps"], score["guidance"]) for score in scores} == {(4, 4, 1.0), (4, 2, 2.0)}
    assert {score["role"] for score in scores} == {"teacher"}
    succeeds(*command, "--n", 100, "--steps", 4, "--solver", "euler")
    assert len(json.loads(file.read_text())) == len(scores), "the same setting replaces its scores"
    succeeds(*command, "--n", 100, "--steps", 4, "--solver", "euler", "--name", "other")
    assert {score["model"] for score in json.loads(file.read_text())} == {"teacher", "other"}
    rows = json.loads(succeeds("compare", file, file, "--json", "-"))
    assert {row["comparable"] for row in rows} == {"yes"}
    assert "fd_squares" in succeeds("compare", file, file)
    before = file.read_bytes()
    for left, right in ((file, tmp_path / "others.json"), (tmp_path / "others.json", file)):
        assert "is an input, which the result would overwrite" in fewstep(
            "compare", left, right, "--json", file.parent / "." / file.name
        ).stderr.replace("\n", " ")
    assert file.read_bytes() == before
    printed = json.loads(succeeds(*command[:-1], "-", "--n", 100, "--steps", 4, "--solver", "euler", cwd=tmp_path))
    assert {score["value"] for score in printed} <= {score["value"] for score in json.loads(before)}
    assert not (tmp_path / "-").exists(), "- is standard output"
    two_others = [score | {"n": 200} for score in scores]
    (tmp_path / "others.json").write_text(json.dumps(two_others))
    assert "have no metric in common" in fewstep("compare", file, tmp_path / "others.json").stderr


def test_eval_refuses_bad_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    assert "No reference 'fashon'" in refused(capsys, "eval", teacher, "--reference", "fashon")
    (tmp_path / "photos_reference").mkdir()
    near = refused(capsys, "eval", teacher, "--reference", tmp_path / "photo_reference")
    assert f"did you mean '{tmp_path / 'photos_reference'}'" in near
    assert f"No reference is known for {teacher}: give --reference" in refused(capsys, "eval", teacher)
    command = ["eval", teacher, "--reference", "fashion"]
    assert "n must be at least 20" in refused(capsys, *command, "--n", "5")
    assert "steps must be at least 1" in refused(capsys, *command, "--steps", "0")
    assert "uint8 images of shape [1, 28, 28]" in refused(capsys, *command, "--n", "20", "--steps", "1")


def test_a_model_that_takes_prompts_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert "takes prompts: give --prompt TEXT, or --prompts FILE" in refused(capsys, "sample", "emoji", "--steps", 1)


def test_one_image_is_counted_as_one(tmp_path: Path) -> None:
    file = tmp_path / "one.png"
    printed = succeeds("sample", tiny_teacher(tmp_path / "teacher"), "--n", 1, "--steps", 1, "--out", file)
    assert printed == f"1 image is in {file}.\n"


def test_a_grid_that_is_there_is_kept(tmp_path: Path) -> None:
    teacher, file = tiny_teacher(tmp_path / "teacher"), tmp_path / "grid.png"
    command = ["sample", teacher, "--n", 2, "--steps", 1, "--out", file]
    assert f"2 images are in {file}." in succeeds(*command)
    before = file.read_bytes()
    for number in (2, 3):
        assert f"2 images are in {tmp_path}/grid-{number}.png. {file} was there before" in succeeds(
            *command, "--seed", 1
        )
    assert file.read_bytes() == before != (tmp_path / "grid-2.png").read_bytes()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = fewstep("train", "nothing.yaml", "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert os.linesep.join(done.stderr.splitlines()[-1:]).startswith("Error: No config file 'nothing.yaml'")


def test_messages_say_what_to_give_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tiny_teacher(tmp_path / "teacher")
    (tmp_path / "teacher.yaml").touch()
    assert "did you mean 'teacher.yaml'?" in refused(capsys, "train", "teacher.yml")
    sampled = refused(capsys, "sample", teacher, "--n", 1, "--steps", 1, "--out", "grid.jpg")
    assert "whose grid is a PNG: --out must end in .png, grid.jpg does not" in sampled
    encoded = refused(capsys, "data", "encode", "prompts.txt", "--teacher", teacher, "--out", "encoded")
    assert "whose captions need no encoding" in encoded


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "fashion", "--solver", "ddim", "--json"),
        ("data", "ode-pairs", "fashion", "--out"),
        ("data", "preferences", "fashion", "--reward", "symmetry", "--solver", "ddim", "--steps", 2, "--out"),
        ("solver", "fit-v3", "fashion", "--out"),
        ("solver", "fit-dc", "fashion", "--out"),
        ("winrate", "fashion", "fashion", "--solver", "ddim", "--steps", 2, "--json"),
        ("solver", "compare", "fashion", "--solvers", "ddim", "--nfe", 4, "--out"),
        ("bench", "sampler", "fashion", "--json"),
        ("sample", "fashion", "--out"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    arguments: tuple[object, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of sampling was once lost because its folder did not exist."""
    for place in (
        "fewstep.samplers.generate.integrate", "fewstep.api.solvers.estimate_statistics",
        "fewstep.api.solvers.search_ratios", "fewstep.api.bench_cost.timed",
    ):  # fmt: skip
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("it began"))
    file = "/proc/none/x.png" if arguments[0] == "sample" else "/proc/none/x.json"
    assert "Cannot write" in refused(capsys, *arguments, file)


def test_a_reference_that_cannot_be_written_is_refused_before_any_training(
    squares: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.eval.build_reference.train_classifier", lambda *a, **k: pytest.fail("it began"))
    assert "Cannot write" in refused(capsys, "data", "reference", squares.parent, "--out", "/proc/none")


def test_folders_of_results_are_created(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    out = tmp_path / "a" / "b"
    two_steps = SamplingConfig("heun", 2)
    data.make_ode_pairs(teacher, out / "pairs.safetensors", n=2, sampling=two_steps, device="cpu")
    solvers.compare_solvers(teacher, solvers=["ddim"], nfe=[2], folder=out / "solvers", n=2, long=4, device="cpu")
    assert sorted(file.name for file in out.rglob("*.*")) == [
        "long.safetensors", "pairs.safetensors", "solvers.json", "solvers.md", "solvers.png",
    ]  # fmt: skip
    with pytest.raises(UserError, match="is a folder; name a file"):
        data.make_ode_pairs(teacher, out, n=2, sampling=two_steps, device="cpu")


def test_pairs_of_a_solver_that_adds_noise_are_refused(tmp_path: Path) -> None:
    """Their samples do not follow from the noise that would be stored beside them."""
    teacher = tiny_teacher(tmp_path / "teacher")
    with pytest.raises(UserError, match="The solver 'ddpm' adds noise, so that its samples are no function of the"):
        data.make_ode_pairs(teacher, tmp_path / "x", n=2, sampling=SamplingConfig("ddpm", 2), device="cpu")
    assert not (tmp_path / "x").exists()


def constant(network: object, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(images))


def test_a_reward_that_prefers_none_of_the_candidates_is_refused(squares: Path, tmp_path: Path) -> None:
    """Winner and loser were once the same sample, and the training on them did nothing."""
    teacher = tiny_teacher(tmp_path / "teacher")
    with pytest.raises(UserError, match="equal for all candidates of the first 4 pairs: it prefers none"):
        data.make_preferences(
            teacher, tmp_path / "x", reward=f"{__name__}:constant", n=4, candidates=2, reference=str(squares),
            sampling=SamplingConfig("euler", 1), device="cpu",
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seeds", "1-3"], "--seeds"), (["--batch", "2"], "--batch"), (["--video", "mp4"], "--video"),
        (["--seeds", "1-3", "--seed", "2"], "--seed"), (["--prompt", "a", "--prompts", "x.txt"], "--prompts"),
    ],
)  # fmt: skip
def test_sample_refuses_options_that_would_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    message = refused(capsys, "sample", teacher, "--out", tmp_path / "x.png", *arguments)
    assert f"remove {named}." in message
    assert not (tmp_path / "x.png").exists()


def test_sample_of_prompts_refuses_the_options_of_labels_and_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers")
    command = ["sample", "fashion-text", "--prompt", "a red coat", "--out", tmp_path / "x"]
    for option, value in (("--n", 3), ("--labels", "1"), ("--video", "mp4")):
        assert f"remove {option}." in refused(capsys, *command, option, value)
    assert not (tmp_path / "x").exists()


def test_a_size_of_a_model_that_has_its_own_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    for command in (["sample", teacher], ["winrate", teacher, teacher]):
        assert "always has the shape [1, 8, 8], so leave size out" in refused(capsys, *command, "--size", "16x16")


@pytest.mark.parametrize("solvers", ["euler,", "", "euler,,ddim"])
def test_an_empty_name_in_a_list_is_refused(capsys: pytest.CaptureFixture[str], solvers: str) -> None:
    """``euler,`` was once sampled twice, and the two equal results shown with the deviation 0 over seeds."""
    assert "--solver takes names separated by commas" in refused(capsys, "eval", "fashion", "--solver", solvers)
    assert "--rewards takes names" in refused(capsys, "winrate", "fashion", "fashion", "--rewards", solvers)
    command = ["solver", "compare", "fashion", "--solvers", solvers]
    assert "--solvers takes names" in refused(capsys, *command)
    with pytest.raises(UserError, match="Unknown solver ''"):
        plan(load_model("fashion"), SamplingConfig(""))
