"""``fewstep app``: what a click computes, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import re
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app_screenshot import CHROMIUM, browser_page, generate, running_app
from commands import refused, succeeds, write_config
from PIL import Image
from torch import Tensor

import fewstep
from fewstep.api import app
from fewstep.api.app import ALL, AppModels, Request
from fewstep.api.app_page import POLICY, click, require_gradio
from fewstep.cli.app import serve_app
from fewstep.core.errors import UserError
from fewstep.eval.hashes import model_sha256
from fewstep.eval.report.comparison import teacher_sampling
from fewstep.models.loading import load_model
from fewstep.samplers.generate import ImageGenerator


def shown(page: str) -> list[Tensor]:
    """The images of each result on a page, uint8 [n, C, H, W]."""
    results = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    found = []
    for result in results:
        images = []
        for data in re.findall(r"data:image/png;base64,([^\"]+)", result):
            with Image.open(io.BytesIO(base64.b64decode(data))) as image:
                pixels = torch.from_numpy(np.array(image))
            images.append(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))
        found.append(torch.stack(images))
    return found


@pytest.fixture(scope="module")
def models(finished: Path) -> AppModels:
    return AppModels.load(finished, device="cpu")


def test_a_click_shows_what_sample_gives_for_teacher_and_student(finished: Path, models: AppModels) -> None:
    teacher, student = models.generate(models.check(3, 2, 5, 4))
    assert (teacher.name, student.name) == ("Teacher", "Student")
    own = fewstep.sample(finished, n=4, labels=[3], sampling=fewstep.SamplingConfig(steps=2, seed=5), device="cpu")
    assert torch.equal(student.images, own)
    assert student.nfe == 2
    source = finished.parent / "teacher"
    other = fewstep.sample(source, n=4, labels=[3], sampling=teacher_sampling(load_model(source), 5), device="cpu")
    assert torch.equal(teacher.images, other)
    assert teacher.nfe == 32
    assert min(teacher.seconds, student.seconds) > 0
    html, kept, _ = click(models, 3, 2, 5, 4, [])
    assert [torch.equal(a, b) for a, b in zip(shown(html), (other, own), strict=True)] == [True, True]
    assert len(kept) == 1
    assert html.count("guidance") == 1, "the teacher's"
    assert "32 network evaluations per image · guidance 1.5 · " in html


def test_the_teacher_of_a_run_is_found_and_another_can_be_named(finished: Path) -> None:
    for source in (finished, finished / "student"):
        teacher = AppModels.load(source, device="cpu").teacher
        assert teacher is not None
        assert teacher.path == finished.parent / "teacher"
    named = AppModels.load(finished, "fashion", "cpu").teacher
    assert named is not None
    assert named.config.class_names is not None
    alone = AppModels.load("fashion", device="cpu")
    assert alone.teacher is None
    assert [result.name for result in alone.generate(Request(ALL, 1, 0, 1))] == ["Model"]


def test_all_classes_come_in_turn_with_their_names() -> None:
    models = AppModels.load("fashion", device="cpu")
    request = models.check(ALL, 1, 0, 12)
    assert models.subjects(request)[8:] == ["bag", "ankle boot", "T-shirt", "trousers"]
    guided = fewstep.SamplingConfig("euler", 1, 1.5)
    assert torch.equal(models.generate(request)[0].images, fewstep.sample("fashion", n=12, sampling=guided))
    page, _, _ = click(models, 9, 1, 0, 1, [])
    assert 'alt="ankle boot"' in page


def test_prompts_are_encoded_with_one_pipeline_for_all_clicks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    from fewstep.models.hub.folder import PipelineFolder

    loaded, original = [], PipelineFolder.pipeline
    monkeypatch.setattr(PipelineFolder, "pipeline", lambda *a, **k: loaded.append(1) or original(*a, **k))
    model = load_model("fashion-text")
    models = AppModels(model, load_model("fashion-text"))
    for prompt in ("a red coat on blue", "a <b>green</b> bag on white"):
        page, kept, _ = click(models, f" {prompt} ", 2, 1, 2, [])
        sampling = fewstep.SamplingConfig("euler", 2, 2.0, seed=1)
        assert torch.equal(shown(page)[1], fewstep.sample(model, prompts=[prompt] * 2, sampling=sampling, device="cpu"))
        loaded.pop()  # that of sample
    assert len(loaded) == 1
    assert "<b>green" not in page + "".join(kept)
    assert "&lt;b&gt;green" in page


BAD = [
    ((3, 0, 0, 1), "The number of steps must be a whole number between 1 and 8, got 0"),
    ((3, 9, 0, 1), "between 1 and 8, got 9"),
    ((3, 2.5, 0, 1), "whole number"),
    ((3, "2", 0, 1), "whole number"),
    ((3, 2, None, 1), "The seed must be a whole number between 0 and 9007199254740992, got nothing."),
    ((3, 2, -1, 1), "The seed must be"),
    ((3, 2, float("nan"), 1), "The seed must be"),
    ((3, 2, 1e300, 1), "The seed must be"),
    ((3, 2, 0, 21), "The number of images must be a whole number between 1 and 20"),
    ((10, 2, 0, 1), "The class must be between 0 and 9, got 10"),
    ((None, 2, 0, 1), "The class must be"),
    (([], 2, 0, 1), "The class must be"),
    (("a shoe", 2, 0, 1), "The class must be"),
]


@pytest.mark.parametrize(("values", "text"), BAD)
def test_bad_input_gives_a_message_and_keeps_earlier_results(models: AppModels, values: Any, text: str) -> None:
    page, kept, gallery = click(models, *values, ["<figure>before</figure>"])
    assert text in page
    assert 'role="alert"' in page
    assert kept == ["<figure>before</figure>"]
    assert "before" in gallery


def test_an_empty_prompt_and_an_unexpected_error_give_messages(
    models: AppModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    text = AppModels(load_model("fashion-text"))
    for prompt in ("", "  ", None, 3):
        assert "Write a prompt" in click(text, prompt, 2, 0, 1, [])[0]

    def broken(*_: object) -> None:
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(AppModels, "generate", broken)
    assert "RuntimeError: out of &lt;memory&gt;" in click(models, 3, 2, 0, 1, [])[0]


def test_a_student_that_takes_its_number_of_steps_refuses_others_at_once(
    models: AppModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AppModels, "generate", lambda *_: pytest.fail("it began"))
    config = models.model.config
    few_step = config.few_step.model_copy(update={"counts": (1, 4)}) if config.few_step else None
    model = models.model.model_copy(update={"config": config.model_copy(update={"few_step": few_step})})
    assert "supports 1, 4, got 3" in click(AppModels(model), 3, 3, 0, 1, [])[0]


def test_two_users_never_compute_at_once(models: AppModels, monkeypatch: pytest.MonkeyPatch) -> None:
    active, most, original = [0], [0], ImageGenerator.__call__

    def counted(*arguments: Any) -> Tensor:
        active[0] += 1
        most[0] = max(most[0], active[0])
        time.sleep(0.02)
        images = original(*arguments)
        active[0] -= 1
        return images

    monkeypatch.setattr(app.ImageGenerator, "__call__", counted)
    threads = [threading.Thread(target=click, args=(models, 3, 2, seed, 2, [])) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_teacher_of_other_classes_is_refused(models: AppModels) -> None:
    config = models.model.config.model_copy(update={"classes": 5})
    with pytest.raises(UserError, match=r"The teacher has 5 classes and the model 10 .* --teacher"):
        AppModels(models.model, models.model.model_copy(update={"config": config}))


def test_names_of_classes_are_checked_and_no_part_of_a_models_hash() -> None:
    model = load_model("fashion")
    nameless = model.model_copy(update={"config": model.config.model_copy(update={"class_names": None})})
    assert model_sha256(nameless) == model_sha256(model)
    with pytest.raises(ValueError, match="class_names must be 10 different names, one for each of the classes"):
        fewstep.ModelConfig.model_validate(model.config.model_dump() | {"class_names": ["bag"]})


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert "The app needs an extra: pip install 'fewstep[app]'" in refused(capsys, "app", "fashion")


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid", "999.0.0.1"])
def test_an_address_that_cannot_be_used_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        message = refused(capsys, "app", "fashion", "--host", host, "--port", taken.getsockname()[1])
    assert f"Cannot listen on {host}, port" in message
    assert "Choose another --port or --host" in message


def test_an_empty_address_is_not_every_address(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    for host in ("", " "):
        assert "--host is empty: give an address of this machine" in refused(capsys, "app", "fashion", "--host", host)


def test_the_page_of_an_unfinished_run_has_the_name_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    named: list[str] = []
    monkeypatch.setattr("fewstep.api.app_page.serve", lambda models, name, *rest: named.append(name))
    monkeypatch.setattr(AppModels, "load", lambda *arguments: None)
    checkpoint = tmp_path / "mine" / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "mine" / "config.yaml").touch()
    (checkpoint / "state.json").touch()
    serve_app(str(checkpoint))
    serve_app("fashion")
    assert named == ["mine, step 4", "fashion"]


LISTEN = """
import ipaddress, sys
def local(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in (None, "", "localhost")
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        host = arguments[1][0] if isinstance(arguments[1], tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if not local(host):
        print("REACHED", event, arguments, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from fewstep.cli.main import main
main()
"""


def test_the_page_in_a_browser(finished: Path) -> None:
    """The real command: two images, equal to those of ``fewstep.sample``; nothing reaches beyond this machine."""
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium was found")
    with running_app(finished, start=("-c", LISTEN)) as (address, process), browser_page(1300, 900) as page:
        assert address.startswith("http://127.0.0.1:")
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        response = page.goto(address)
        assert response.headers["content-security-policy"] == POLICY
        page.get_by_label("Images").first.fill("1")
        generate(page, 7)
        images = shown(page.locator(".fewstep-results").first.inner_html())
        sampling = fewstep.SamplingConfig(seed=7)
        assert len(images) == 2
        assert torch.equal(images[1], fewstep.sample(finished, n=1, sampling=sampling, device="cpu"))
        source = finished.parent / "teacher"
        taught = teacher_sampling(load_model(source), 7)
        assert torch.equal(images[0], fewstep.sample(source, n=1, sampling=taught, device="cpu"))
        generate(page, 8)
        playwright.expect(page.locator(".fewstep-earlier figure")).to_have_count(1)
        page.get_by_label("Seed").fill("")
        page.get_by_role("button", name="Generate").click()
        page.get_by_role("alert").get_by_text("The seed must be a whole number").wait_for()
        playwright.expect(page.locator(".fewstep-earlier figure")).to_have_count(2)
        for width in (1300, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        foreign = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        process.send_signal(signal.SIGINT)  # ends it, although the page is open
        assert process.wait(timeout=20) == 130
        assert "REACHED" not in process.stderr.read()
    assert foreign == []
    assert requests


def test_the_command_passes_its_options_on(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gradio")
    require_gradio()
    calls: list[Any] = []
    monkeypatch.setattr("fewstep.api.app_page.serve", lambda *arguments: calls.append(arguments))
    succeeds("app", finished, "--device", "cpu")
    succeeds("app", "fashion", "--teacher", "fashion", "--host", "0.0.0.0", "--port", 8000)
    assert [call[1:4] for call in calls] == [("run", "127.0.0.1", 7860), ("fashion", "0.0.0.0", 8000)]
    assert calls[1][0].teacher is not None


def test_a_run_whose_config_names_no_teacher_is_shown_alone(tmp_path: Path) -> None:
    write_config(tmp_path)  # writes a teacher as a plain model folder
    assert AppModels.load(tmp_path / "teacher", device="cpu").teacher is None
