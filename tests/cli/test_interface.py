"""The command line as a whole: fast help, a version, examples, old names."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from commands import fewstep, refused, succeeds, write_config

from fewstep.api.training_progress import TrainingProgress
from fewstep.cli import main as cli_main
from fewstep.cli.main import RENAMED, app
from fewstep.cli.options import TaskProgress, counting, parse_seeds, print_table, print_text
from fewstep.core.errors import UserError
from fewstep.core.paths import is_hub_id, nearest_folder
from fewstep.distill.config_files import parse_config
from fewstep.models.loading import bundled_models

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numpy", "diffusers", "transformers", "peft", "accelerate", "matplotlib", "PIL", "yaml")


def commands() -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command with its full name."""

    def below(group: object, prefix: str) -> Iterator[tuple[str, typer.core.TyperCommand]]:
        for name, command in group.commands.items():  # type: ignore[attr-defined]
            if isinstance(command, typer.core.TyperGroup):
                yield from below(command, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name}", command

    yield from below(typer.main.get_command(app), "")


COMMANDS = dict(commands())


def test_the_commands_are_those_of_the_design() -> None:
    assert set(COMMANDS) == {
        "demo", "train", "sample", "eval", "compare", "report", "export", "explain", "winrate", "replay",
        "app", "doctor",
        "data encode", "data reference", "data ode-pairs", "data preferences",
        "solver list", "solver compare", "solver fit-v3", "solver fit-dc",
        "bench objectives", "bench step", "bench sampler", "bench memory",
    }  # fmt: skip


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --help", "solver --help"])
def test_help_and_version_import_nothing_heavy(arguments: str) -> None:
    code = f"""
import sys
from fewstep.cli.main import main
sys.argv = ["fewstep", *{arguments.split()!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
found = set({HEAVY!r}) & set(sys.modules)
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_importing_fewstep_imports_nothing_heavy() -> None:
    code = f"import sys, fewstep; assert not set({HEAVY!r}) & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version() -> None:
    assert succeeds("--version").strip() == f"fewstep {version('fewstep')}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_text_has_a_valid_example_and_explains_its_options(name: str) -> None:
    command = COMMANDS[name]
    assert command.epilog is not None
    example = re.fullmatch(rf"Example: fewstep {name} ?(.*)", command.epilog)
    assert example is not None, command.epilog
    with command.make_context(name, example[1].split()):
        pass  # parsed: its arguments and options exist
    assert command.help
    for parameter in command.params:
        text = parameter.help if isinstance(parameter, typer.core.TyperOption | typer.core.TyperArgument) else None
        assert text or parameter.name == "help", f"{name}: {parameter.name} has no help text"


def test_the_help_of_a_model_names_all_bundled_ones() -> None:
    (model,) = (each for each in COMMANDS["sample"].params if each.name == "model_name")
    assert isinstance(model, typer.core.TyperArgument)
    assert str(model.help).endswith(f"or a bundled model: {', '.join(bundled_models())}.")


def test_help_shows_defaults() -> None:
    text = " ".join(fewstep("data", "ode-pairs", "--help").stdout.split())
    assert "default: heun" in text
    assert "default: 18" in text


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_command_is_answered_with_the_new_one(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, old, "x")
    assert f"The command '{old}' is now: fewstep {RENAMED[old]}." in message
    assert RENAMED[old].split(" (")[0] in COMMANDS


def test_the_old_option_of_comparing_is_answered_with_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fewstep compare A.json B.json" in refused(capsys, "eval", "--compare", "a.json", "b.json")


def test_completion_is_offered() -> None:
    assert "--install-completion" in fewstep("--help").stdout


def test_json_on_standard_output_is_json_alone() -> None:
    solvers = json.loads(succeeds("solver", "list", "--json", "-"))
    assert {"solver": "unipc_2", "order": "3", "evaluations per step": "1"}.items() <= {
        key: value for row in solvers if row["solver"] == "unipc_2" for key, value in row.items()
    }.items()
    (stage,) = json.loads(succeeds("explain", "configs/fashion/tdm.yaml", "--json", "-"))
    assert stage["evaluations_per_step"] == 5
    assert [update["due"] for update in stage["updates"]] == [2, 1]


def test_an_imported_module_may_be_called_like_an_old_command(tmp_path: Path) -> None:
    (tmp_path / "pairs.py").write_text("")
    assert "unipc_2" in succeeds("--import", "pairs", "solver", "list", cwd=tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "sampler", "fashion", "--rounds"), ("bench", "sampler", "fashion", "--batch"),
        ("eval", "fashion", "--n"), ("eval", "fashion", "--protocol", "fashion", "--n"),
        ("winrate", "fashion", "fashion", "--n"),
    ],
)  # fmt: skip
def test_counts_below_their_minimum_are_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *arguments, "0")
    assert re.search(rf"{arguments[-1]}.*(is not in the range x>=1|should be greater than or equal to)", message)


def test_a_range_of_seeds_that_ends_before_it_starts_is_refused() -> None:
    """It would sample nothing."""
    for text in ("3-1", "1-0"):
        with pytest.raises(UserError, match=f"--seeds {text} contains no seed: give the smaller number first"):
            parse_seeds(text, 0)
    assert parse_seeds("3-3", 0) == [3]
    assert parse_seeds("1-3", 0) == [1, 2, 3]


def test_file_names_are_not_taken_for_markup(tmp_path: Path) -> None:
    assert "[/b].png" in succeeds("sample", "fashion", "--n", 1, "--steps", 1, "--out", "[/b].png", cwd=tmp_path)


UGLY = ["a/[/b]", "[final]", "{}", "{0!r}", ":smiley:", "%s", "a" * 300, "it's $HOME; rm", "\\[bold]"]


@pytest.mark.parametrize("text", UGLY)
def test_texts_of_users_are_printed_as_they_are_and_in_one_line(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_text(f"The student is in {text}.")
    assert capsys.readouterr().out == f"The student is in {text}.\n"
    print_table([("head", text[:20]), (text[:20], "x")])
    table = capsys.readouterr().out
    assert table.count(text[:20]) == 2
    with counting(text) as moved:  # the description of a progress bar
        moved(1, 2)


def test_off_a_terminal_a_long_task_says_now_and_then_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = [0.0]
    with TaskProgress(lambda: seconds[0]) as bar:
        first, second = bar.add_task("measuring", total=None), bar.add_task("[sampling]", total=300)
        for now in range(0, 100, 3):
            seconds[0] = float(now)
            bar.update(first if now < 40 else second, completed=now, total=None if now < 40 else 300)
    lines = capsys.readouterr().err.split("\n")
    assert lines[:4] == ["measuring 6", "measuring 36", "[sampling] 66/300", "[sampling] 96/300"]
    assert not any(lines[4:])


def test_names_that_are_not_utf_8_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_text(os.fsdecode(b"run-\xff"))  # standard output refuses what it cannot encode
    assert capsys.readouterr().out == "run-\\udcff\n"
    (tmp_path / os.fsdecode(b"run-\xff")).mkdir()
    done = fewstep("report", os.fsdecode(b"run-\xff"), cwd=tmp_path)
    assert (done.returncode, "is not a run folder" in done.stderr) == (1, True)
    assert "unexpected" not in done.stderr


@pytest.mark.parametrize("command", [("[/b]",), ("report", "[/b]"), ("sample", "fashion", "--[/b]"), ("train", "[/b]")])
def test_arguments_with_brackets_are_refused_without_a_traceback(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "[/b]" in refused(capsys, *command)


def test_the_command_that_resumes_a_run_can_be_pasted_into_a_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / f"it's [/b] {'long ' * 20}name"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    message = refused(capsys, "sample", run)
    words = shlex.split(message.partition("Continue it with ")[2].removesuffix("."))
    assert words == ["fewstep", "train", "--resume", str(run)]


def test_a_run_in_place_of_a_config_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert f"is a run, not a config. Continue it with fewstep train --resume {tmp_path}" in refused(
        capsys, "train", tmp_path
    )


def test_known_configs_are_listed_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    known = refused(capsys, "train", "configs/emoji/dmo.yaml").partition("(known: ")[2].split(", ")
    assert len(known) == len(set(known))


def test_folders_of_the_root_are_not_listed() -> None:
    assert nearest_folder(Path("/nonexistent")) == "; the nearest folder that exists is '/'"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/tdn", "there is no such folder; did you mean 'runs/tdm'?"),
        ("runs/a/b/c", "there is no such folder; the nearest folder that exists is"),
        ("./tdm", "there is no such folder"),
        ("../tdm", "there is no such folder"),
        ("~/tdm", "there is no such folder"),
        ("/nowhere/tdm", "there is no such folder"),
        ("mine/tdm", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
    ],
)
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tdm").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    assert message in refused(capsys, "sample", path)
    assert "does not exist" in refused(capsys, "eval", path)


def test_owner_and_name_are_a_hub_id_unless_they_look_like_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("stabilityai/sd-turbo")
    for path in ("runs/tdm", "./tdm", "../tdm", "~/tdm", ".cache/tdm", "/tdm", "a/b/c", "tdm", "tdm/", ""):
        assert not is_hub_id(path)
    (tmp_path / "stabilityai").mkdir()
    assert not is_hub_id("stabilityai/sd-turbo")


def test_a_prompt_for_a_class_conditional_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "takes class labels, not prompts" in refused(capsys, "sample", "fashion", "--prompt", "a shoe")


def test_ctrl_c_in_any_command_ends_with_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fewstep.cli.solver.print_table", interrupted)
    monkeypatch.setattr(sys, "argv", ["fewstep", "solver", "list"])
    with pytest.raises(SystemExit) as exit_:
        cli_main.main()
    assert exit_.value.code == 130
    assert "Interrupted" in capsys.readouterr().err


def test_modules_in_the_current_folder_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "in_this_folder.py").write_text(
        "import fewstep\nfrom fewstep.samplers.solvers import Solver\n"
        "fewstep.register('solver', 'mine')(Solver(lambda predict, x, times: x, 1, 0, 'none'))\n"
    )
    script = "import sys; sys.path.remove(''); from fewstep.cli.main import main; main()"  # as the console script is
    command = [sys.executable, "-c", script, "--import", "in_this_folder", "solver", "list"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout


def test_long_work_is_refused_if_its_result_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path)
    for command in (["bench", "memory", config], ["eval", "fashion", "--n", 20]):
        assert str(tmp_path / "file") in refused(capsys, *command, "--json", tmp_path / "file" / "scores.json")


def test_steps_and_nfe_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--steps or --nfe, not both" in refused(capsys, "eval", "fashion", "--steps", 2, "--nfe", 4)


def test_the_progress_of_a_long_run_keeps_a_constant_part_of_its_log() -> None:
    """Else each log line would cost more than the one before."""
    raw = {"stages": [{"steps": 1, "objective": "flow_matching", "roles": {"student": {"lr": 1e-3}}}]}
    config = parse_config(raw | {"log_every": 10, "health": {"every": 500}}, "test")
    trainer = SimpleNamespace(config=config, best={}, step=1, seconds=1.0)
    with TrainingProgress(1000) as progress:
        for _ in range(300):
            progress.on_log(trainer, {"loss/match": 1.0})  # type: ignore[arg-type]
    assert len(progress._logged) == 51, "from one health check to the next"


@pytest.mark.parametrize("argument", ["--steps", "--batch=3"])
def test_settings_given_as_options_are_explained(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "configs/fashion/demo.yaml", argument, 100)
    assert f"{argument.partition('=')[0]} is no option of fewstep train. Settings are given without dashes" in message
    assert "Possible options: --resume" in refused(capsys, "train", "configs/fashion/demo.yaml", "--resum", "run")
