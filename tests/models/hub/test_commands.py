"""Prompts through the commands: encoding once, training on them, sampling from words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fewstep.distill.run import Run
from PIL import Image
from tiny_pipelines import TINY, settings

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.core.image_files import read_video, size_of
from fewstep.core.image_grid import save_sample
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config import parse_config
from fewstep.distill.data.sources import Prompts
from fewstep.models.condition import Condition
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.loading import load_model, pipeline_of
from fewstep.samplers.generate import GeneratedSet, ImageGenerator, SamplingConfig

pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
LINES = ["a cat", "two dogs", "the sea", "a red cat", "nothing at all"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_encoded_prompts_are_what_the_pipeline_encodes(saved: Saved, name: str, prompts: Path, tmp_path: Path) -> None:
    assert fewstep.encode(saved(name), prompts, tmp_path / "out", rows=2, batch=1, device="cpu") == 5
    stored = EncodedPrompts(tmp_path / "out")
    rows = torch.tensor([4, 0, 2])
    condition = stored(rows)
    folder = PipelineFolder.open(saved(name))
    expected = folder.condition(folder.pipeline(), [LINES[k] for k in rows])
    for key in expected:
        torch.testing.assert_close(condition[key], expected[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(condition.null()[key], expected.null()[key], rtol=1e-4, atol=1e-4)


def test_encoding_goes_on_where_it_stopped(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewstep.encode(saved("sd"), prompts, out, rows=2, device="cpu")
    whole = {file.name: read_tensors(file) for file in out.glob("*.safetensors")}
    assert len(whole) == 4
    (out / "shard-00001.safetensors").unlink()
    kept = (out / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="incomplete"):
        EncodedPrompts(out)
    fewstep.encode(saved("sd"), prompts, out, rows=2, device="cpu")
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == kept
    again = read_tensors(out / "shard-00001.safetensors")
    assert torch.equal(again["prompt"], whole["shard-00001.safetensors"]["prompt"])


def test_mistakes_in_prompts_are_named_by_line(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    prompts.write_bytes(b"a cat\n\na dog\n")
    with pytest.raises(UserError, match=r"prompts.txt, line 2 is empty"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out")
    prompts.write_bytes("a cat\nein Kätzchen\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompts.txt, line 2 is not UTF-8"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out")
    prompts.write_bytes(b"")
    with pytest.raises(UserError, match="holds no prompts"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_prompts_or_encoders_are_refused(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    fewstep.encode(saved("sd"), prompts, tmp_path / "out", device="cpu")
    with pytest.raises(UserError, match="another encoder"):
        fewstep.encode(saved("sdxl"), prompts, tmp_path / "out", device="cpu")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "out": str(tmp_path / "run"), "teacher": str(saved("sdxl")), "size": [16, 16, 1],
                "data": {"kind": "prompts", "path": str(tmp_path / "out")},
                "stages": [{"steps": 1, "objective": "tdm", "roles": {"student": {"lr": 1e-3}, "fake": {"lr": 1e-3}}}],
            }
        )
    )  # fmt: skip
    with pytest.raises(UserError, match="encoded by another pipeline's text encoders"):
        fewstep.train(tmp_path / "config.yaml")


def test_samples_are_files_that_do_not_depend_on_the_batch(saved: Saved, tmp_path: Path) -> None:
    model = load_model(saved("sd"), size=TINY["sd"].size)
    settings = {"seeds": [0, 3], "steps": 2, "guidance": 2.0}
    files = fewstep.sample_files(model, LINES[:3], tmp_path / "one", batch=1, **settings)
    assert [file.name for file in files] == [f"{k:05d}-{seed}.png" for seed in (0, 3) for k in range(3)]
    many = fewstep.sample_files(model, LINES[:3], tmp_path / "many", batch=3, **settings)
    for a, b in zip(files, many, strict=True):
        with Image.open(a) as left, Image.open(b) as right:
            assert left.size == (16, 16)
            difference = np.asarray(left).astype(int) - np.asarray(right)
            assert abs(difference).max() <= 2
    kept = files[1].stat().st_mtime_ns
    files[2].unlink()
    fewstep.sample_files(model, LINES[:3], tmp_path / "one", batch=2, **settings)
    assert files[1].stat().st_mtime_ns == kept
    assert files[2].is_file()
    assert fewstep.sample(model, prompts=LINES[:2], steps=2).shape == (2, 3, 16, 16)


def test_a_model_of_labels_takes_no_prompts_and_the_other_way_round(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="takes class labels"):
        fewstep.sample("fashion", prompts=["a shoe"])
    with pytest.raises(UserError, match="takes prompts"):
        fewstep.sample(load_model(saved("sd"), size=(16, 16, 1)), n=2)
    for work in (
        lambda: fewstep.make_pairs(saved("sd"), tmp_path / "pairs.safetensors", n=2),
        lambda: make.make_preferences(saved("sd"), tmp_path / "pairs.safetensors", reward="symmetry", n=2),
        lambda: measure.win_rates(saved("sd"), saved("sd"), n=2),
    ):
        with pytest.raises(UserError, match="this one takes prompts"):
            work()


def test_prompts_are_encoded_a_part_at_a_time_and_each_once(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of 30,000 captions at once would fill the memory."""
    model, encoded, encode = load_model(saved("sd"), size=(16, 16, 1)), [], PipelineFolder.condition

    def recorded(folder: PipelineFolder, pipeline: object, prompts: list[str]) -> Condition:
        encoded.append(prompts)
        return encode(folder, pipeline, prompts)

    monkeypatch.setattr(PipelineFolder, "condition", recorded)
    monkeypatch.setattr("fewstep.samplers.generate.PART", 4)
    drawing = GeneratedSet(model, SamplingConfig("euler", 1), 7, LINES[:2])
    parts = list(drawing.parts())
    assert [len(part) for part in parts] == [4, 3]
    assert encoded == [LINES[:2], LINES[:2]]
    assert drawing.nfe == 1
    whole = ImageGenerator(model, LINES[:2])([0, 1, 0, 1, 0, 1, 0], SamplingConfig("euler", 1))
    assert (torch.cat(parts).int() - whole.int()).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_video_is_written_and_read_back(suffix: str, tmp_path: Path) -> None:
    if suffix == "mp4":
        pytest.importorskip("av")
    shades = torch.arange(5, dtype=torch.uint8) * 40
    video = shades[:, None, None, None].expand(5, 3, 16, 32).contiguous()
    file = tmp_path / f"a.{suffix}"
    save_sample(video, file)
    again = read_video(file, 5)
    assert again.shape == (3, 5, 16, 32)
    assert size_of(file) == (16, 32)
    assert (again.transpose(0, 1).int() - video.int()).abs().max() <= 3
    assert read_video(file, 2, cover=(8, 8)).shape == (3, 2, 8, 8)
    with pytest.raises(UserError, match=r"a\.\w+ has 5 frames, 9 are wanted"):
        read_video(file, 9)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.\w+ is no readable video"):
        read_video(file, 1)
    with pytest.raises(UserError, match=r"a\.\w+ is no readable picture or video"):
        size_of(file)


def test_a_batch_is_of_one_of_several_sizes(saved: Saved, tmp_path: Path) -> None:
    """Pictures go to the size of the nearest proportions; prompts alone are drawn at any."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for k, size in enumerate([(16, 16), (64, 40), (20, 20), (30, 64), (33, 60)]):  # width, height
        Image.new("RGB", size, (50 * k, 0, 0)).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text("abcde"[k])
    sizes = [(16, 16), (16, 32), (32, 16)]
    fewstep.encode(saved("sd"), images, out, sizes=sizes, device="cpu")
    stored = EncodedPrompts(out)
    assert [tuple(x0.shape) for x0, _ in stored.buckets] == [(2, 4, 8, 8), (1, 4, 8, 16), (2, 4, 16, 8)]
    assert [prompts.tolist() for _, prompts in stored.buckets] == [[0, 2], [1], [3, 4]]
    source = Prompts(stored, [(4, 8, 8)])
    seen = [source(KeyedRandom(0, step, "data", 0), 4) for step in range(60)]
    shapes = Counter(batch.shape for batch in seen)
    assert set(shapes) == {(4, 8, 8), (4, 8, 16), (4, 16, 8)}
    assert all(batch["x0"].shape[1:] == batch.shape for batch in seen)
    raw = settings(saved("sd"), "sd", tmp_path / "run", None)
    raw["data"] |= {"sizes": [[16, 16, 1], [16, 32, 1]]}
    run = Run.create(parse_config(raw, "test"), torch.device("cpu"))
    drawn = {run.loop.sources["data"](KeyedRandom(0, step, "data", 0), 2).shape for step in range(20)}
    assert drawn == {(4, 8, 8), (4, 8, 16)}
    run.train()
    with pytest.raises(UserError, match=r"3\.png is not of the size of .*0\.png|1\.png is not of the size"):
        fewstep.encode(saved("sd"), images, tmp_path / "other", device="cpu")


def test_videos_with_captions_become_latents(saved: Saved, tmp_path: Path) -> None:
    folder = saved("sd")
    video = torch.randint(0, 256, (9, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "clips").mkdir()
    save_sample(video, tmp_path / "clips" / "a.gif")
    (tmp_path / "clips" / "a.txt").write_text("waves")
    with pytest.raises(UserError, match="No pictures"):
        fewstep.encode(folder, tmp_path / "clips", tmp_path / "out", device="cpu")
    wan = PipelineFolder.open(saved("wan"))
    with torch.no_grad():
        pixels = read_video(tmp_path / "clips" / "a.gif", 9)[None].float() / 127.5 - 1
        latents = wan.family.encode_images(wan.pipeline(), pixels)
    assert latents.shape[1:] == wan.family.shape(32, 32, 9)
    with pytest.raises(UserError, match="has no text encoder"):
        fewstep.encode(saved("wan"), tmp_path / "clips", tmp_path / "out", frames=9, device="cpu")


def test_a_folder_that_is_no_pipeline_and_an_unsupported_family(tmp_path: Path, saved: Saved) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"model_index.json"):
        load_model(tmp_path / "empty")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(UserError, match=r"'DiTPipeline' are not supported.*FluxPipeline.*WanPipeline"):
        load_model(tmp_path / "other")
    with pytest.raises(UserError, match="do not divide by 2"):
        load_model(saved("sd"), size=(15, 16, 1))
    assert pipeline_of(load_model(saved("sd"))).path == saved("sd")


def test_a_stored_prompt_is_drawn_as_a_label_is(saved: Saved) -> None:
    source = Prompts(EncodedPrompts(saved("sd") / "prompts"), [(4, 8, 8)])
    batch = source(KeyedRandom(0, 1, "data", 0), 3)
    again = source(KeyedRandom(0, 1, "data", 0), 3)
    assert torch.equal(batch.condition["prompt"], again.condition["prompt"])
    assert batch.condition["prompt"].shape == (3, 5, 32)


def test_pictures_with_captions_become_latents_with_prompts(saved: Saved, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    numbers = np.random.default_rng(0)
    captions = ["a cat", "two dogs", "a cat"]
    pixels = numbers.integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for k, caption in enumerate(captions):
        Image.fromarray(pixels[k]).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text(caption)
    assert fewstep.encode(saved("sd"), images, out, batch=2, rows=2, device="cpu") == 3
    stored = EncodedPrompts(out)
    assert len(stored) == 2
    [(x0, prompts)] = stored.buckets
    assert prompts.tolist() == [0, 1, 0]
    folder = PipelineFolder.open(saved("sd"))
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        torch.testing.assert_close(x0, folder.family.encode_images(folder.pipeline(), x), rtol=1e-4, atol=1e-4)
    batch = Prompts(stored, [(4, 8, 8)])(KeyedRandom(0, 0, "data", 0), 5)
    for row, image in zip(batch["x0"], batch.condition["prompt"], strict=True):
        k = int((x0 - row).flatten(1).abs().sum(1).argmin())
        assert torch.equal(image, stored(prompts[k : k + 1])["prompt"][0])
    (out / "images-00001.safetensors").unlink()
    with pytest.raises(UserError, match="incomplete"):
        EncodedPrompts(out)
    (images / "2.txt").unlink()
    with pytest.raises(UserError, match=r"2\.png has no caption"):
        fewstep.encode(saved("sd"), images, tmp_path / "other")
