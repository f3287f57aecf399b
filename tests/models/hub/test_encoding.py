"""Encoding prompts, captioned images and captioned videos once, and the data source that reads them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import refused
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import settings

import fewstep
from fewstep.core.errors import UserError
from fewstep.core.files import read_tensors
from fewstep.core.image_files import image_size, read_video
from fewstep.core.image_grid import save_sample
from fewstep.core.keyed_random import KeyedRandom
from fewstep.distill.config_files import parse_config
from fewstep.distill.data.sources import Prompts
from fewstep.distill.run_folder import RunFolder
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.folder import PipelineFolder

pytest.importorskip("diffusers")
Saved = Callable[[str], Path]
LINES = ["a cat", "two dogs", "the sea", "a red cat", "nothing at all"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return file


# ---- prompts


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_encoded_prompts_equal_the_pipelines_own(saved: Saved, name: str, prompts: Path, tmp_path: Path) -> None:
    assert fewstep.encode(saved(name), prompts, tmp_path / "out", rows=2, batch=1, device="cpu") == 5
    stored = EncodedPrompts(tmp_path / "out")
    rows = torch.tensor([4, 0, 2])
    condition = stored(rows)
    folder = PipelineFolder.open(saved(name))
    expected = folder.condition(folder.pipeline(), [LINES[k] for k in rows])
    for key in expected:
        torch.testing.assert_close(condition[key], expected[key], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(condition.null()[key], expected.null()[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["cut", "empty", "missing"])
def test_a_damaged_encoder_is_named_and_the_call_can_be_repeated(
    saved: Saved, prompts: Path, tmp_path: Path, change: str
) -> None:
    teacher, out = shutil.copytree(saved("sd"), tmp_path / "sd"), tmp_path / "out"
    weights = teacher / "text_encoder" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2] if change == "cut" else b"")
    if change == "missing":
        weights.unlink()
    with pytest.raises(UserError, match=r"The pipeline in .*sd cannot be loaded"):
        fewstep.encode(teacher, prompts, out, device="cpu")
    weights.write_bytes(content)
    assert fewstep.encode(teacher, prompts, out, device="cpu") == 5


def test_a_start_that_was_killed_does_not_occupy_the_folder(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("index.json.part", ".index.json.part"):  # the index, and the trial that the folder can be written
        (tmp_path / "out" / name).write_text("{")
    assert fewstep.encode(saved("sd"), prompts, tmp_path / "out", device="cpu") == 5
    assert not list((tmp_path / "out").glob("*.part"))


def test_an_interrupted_encoding_continues(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fewstep.encode(saved("sd"), prompts, out, rows=2, device="cpu")
    first = {file.name: read_tensors(file) for file in out.glob("*.safetensors")}
    assert len(first) == 4
    (out / "shard-00001.safetensors").unlink()
    kept = (out / "shard-00000.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="incomplete"):
        EncodedPrompts(out)
    fewstep.encode(saved("sd"), prompts, out, rows=2, device="cpu")
    assert (out / "shard-00000.safetensors").stat().st_mtime_ns == kept
    second = read_tensors(out / "shard-00001.safetensors")
    assert torch.equal(second["prompt"], first["shard-00001.safetensors"]["prompt"])


def test_mistakes_in_prompts_are_reported_by_line(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    prompts.write_bytes(b"a cat\n\na dog\n")
    with pytest.raises(UserError, match=r"prompts.txt, line 2 is empty"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out")
    prompts.write_bytes("a cat\nein Kätzchen\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompts.txt, line 2 is not UTF-8"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out")
    prompts.write_bytes(b"")
    with pytest.raises(UserError, match="contains no prompts"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encodings_of_other_prompts_or_encoders_are_refused(saved: Saved, prompts: Path, tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match=r"encoded by other text encoders.*fewstep data encode --teacher"):
        fewstep.train(tmp_path / "config.yaml")


def test_options_for_images_are_refused_for_a_text_file(
    saved: Saved, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "encode", prompts, "--teacher", saved("sd"), "--out", tmp_path / "out"]
    for option in (["--sizes", "16x16"], ["--frames", 9]):
        assert "remove --sizes and --frames" in refused(capsys, *command, *option)
    assert "give the number of frames with --frames" in refused(capsys, *command, "--sizes", "16x16,16x32x9")
    assert not (tmp_path / "out").exists()


def test_a_refusal_to_continue_names_what_differs(saved: Saved, prompts: Path, tmp_path: Path) -> None:
    fewstep.encode(saved("sd"), prompts, tmp_path / "out", rows=2, device="cpu")
    with pytest.raises(UserError, match=r"\(rows in index\.json would differ\)"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out", rows=3, device="cpu")
    prompts.write_text("another prompt\n")
    with pytest.raises(UserError, match=r"\(prompts, count in index\.json would differ\)"):
        fewstep.encode(saved("sd"), prompts, tmp_path / "out", rows=2, device="cpu")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("shard-00001", lambda x: x[:1], r"prompt must be \[2, \d+, 32\] of torch\.float32, got \[1, "),
        ("shard-00002", lambda x: torch.cat([x, x]), r"prompt must be \[1, "),
        ("shard-00000", lambda x: torch.cat([x, x], -1), r"got \[2, \d+, 64\]"),
        ("shard-00000", lambda x: x.long(), "of torch.int64"),
        ("shard-00001", lambda x: x.index_fill(0, torch.tensor([1]), torch.nan), "row 1 is not finite"),
        ("null", lambda x: torch.cat([x, x]), "must be one finite row"),
        ("null", lambda x: x * torch.inf, "must be one finite row"),
        ("null", lambda x: x.sum(), "must be one finite row"),
        ("shard-00000", lambda x: x.sum(), "shard-00000"),
    ],
)  # fmt: skip
def test_damaged_conditions_are_refused(
    saved: Saved, prompts: Path, tmp_path: Path, file: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    """A shard that lost rows must not become a smaller batch, nor another width a condition of another shape."""
    out = tmp_path / "out"
    fewstep.encode(saved("sd"), prompts, out, rows=2, device="cpu")
    path = out / f"{file}.safetensors"
    save_file({"prompt": change(read_tensors(path)["prompt"]).contiguous()}, path)
    with pytest.raises(UserError, match=message):
        EncodedPrompts(out)(torch.arange(5))


def test_a_folder_without_encoded_prompts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json does not exist\. Create it with fewstep data encode"):
        EncodedPrompts(tmp_path)


def test_a_batch_of_prompts_depends_on_its_key_alone(saved: Saved) -> None:
    source = Prompts(EncodedPrompts(saved("sd") / "prompts"), [(4, 8, 8)])
    batch, same, other = (source(KeyedRandom(0, step, "data", 0), 3) for step in (1, 1, 2))
    assert torch.equal(batch.condition["prompt"], same.condition["prompt"])
    assert not torch.equal(batch.condition["prompt"], other.condition["prompt"])
    assert batch.condition["prompt"].shape == (3, 5, 32)


# ---- images and videos


def test_captioned_images_become_latents_with_prompts(saved: Saved, tmp_path: Path) -> None:
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
    [(latents, prompts)] = stored.buckets
    x0 = latents["x0"]
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
    (images / "2.txt").write_text("a cat\non a mat\n")
    with pytest.raises(UserError, match=r"2\.txt has 2 lines; a caption must be one line"):
        fewstep.encode(saved("sd"), images, tmp_path / "other")
    (images / "2.txt").unlink()
    with pytest.raises(UserError, match=r"2\.png has no caption: 2\.txt is missing"):
        fewstep.encode(saved("sd"), images, tmp_path / "other")


@pytest.mark.parametrize("change", ["pixels", "captions", "vae"])
def test_latents_of_other_images_captions_or_vae_are_not_kept(saved: Saved, tmp_path: Path, change: str) -> None:
    """Names, number and set of captions stay the same; what was encoded does not."""
    images, out, teacher = tmp_path / "images", tmp_path / "out", tmp_path / "sd"
    images.mkdir()
    shutil.copytree(saved("sd"), teacher)
    for k, caption in enumerate(["a cat", "two dogs", "a cat"]):
        Image.new("RGB", (16, 16), (50 * k, 0, 0)).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text(caption)
    fewstep.encode(teacher, images, out, device="cpu")
    assert fewstep.encode(teacher, images, out, device="cpu") == 3
    if change == "pixels":
        Image.new("RGB", (16, 16), (0, 9, 0)).save(images / "1.png")
    elif change == "captions":
        (images / "2.txt").write_text("two dogs")
    else:
        weights = teacher / "vae" / "diffusion_pytorch_model.safetensors"
        save_file({name: 2 * value for name, value in read_tensors(weights).items()}, weights)
    with pytest.raises(UserError, match=r"contains other prompts or samples.*\(source in index\.json would differ"):
        fewstep.encode(teacher, images, out, device="cpu")


def test_all_samples_of_a_batch_have_one_of_several_sizes(saved: Saved, tmp_path: Path) -> None:
    """Images are resized to the nearest aspect ratio; prompts without images are sampled at all sizes."""
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for k, size in enumerate([(16, 16), (64, 40), (20, 20), (30, 64), (33, 60)]):  # width, height
        Image.new("RGB", size, (50 * k, 0, 0)).save(images / f"{k}.png")
        (images / f"{k}.txt").write_text("abcde"[k])
    sizes = [(16, 16), (16, 32), (32, 16)]
    fewstep.encode(saved("sd"), images, out, sizes=sizes, device="cpu")
    stored = EncodedPrompts(out)
    assert [tuple(latents["x0"].shape) for latents, _ in stored.buckets] == [(2, 4, 8, 8), (1, 4, 8, 16), (2, 4, 16, 8)]
    assert [prompts.tolist() for _, prompts in stored.buckets] == [[0, 2], [1], [3, 4]]
    source = Prompts(stored, [(4, 8, 8)])
    batches = [source(KeyedRandom(0, step, "data", 0), 4) for step in range(60)]
    shapes = Counter(batch.shape for batch in batches)
    assert set(shapes) == {(4, 8, 8), (4, 8, 16), (4, 16, 8)}
    assert all(batch["x0"].shape[1:] == batch.shape for batch in batches)
    raw = settings(saved("sd"), "sd", tmp_path / "run", None)
    raw["data"] |= {"sizes": [[16, 16, 1], [16, 32, 1]]}
    run = RunFolder.create(parse_config(raw, "test"), torch.device("cpu"))
    prompts_alone = run.trainer.loop.sources["data"]
    assert {prompts_alone(KeyedRandom(0, step, "data", 0), 2).shape for step in range(20)} == {(4, 8, 8), (4, 8, 16)}
    run.train()
    with pytest.raises(UserError, match=r"1\.png and .*0\.png differ in size; resize them, or set --sizes"):
        fewstep.encode(saved("sd"), images, tmp_path / "other", device="cpu")


def test_captioned_videos_become_latents(saved: Saved, tmp_path: Path) -> None:
    video = torch.randint(0, 256, (9, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    (tmp_path / "clips").mkdir()
    save_sample(video, tmp_path / "clips" / "a.gif")
    (tmp_path / "clips" / "a.txt").write_text("waves")
    with pytest.raises(UserError, match="No images"):
        fewstep.encode(saved("sd"), tmp_path / "clips", tmp_path / "out", device="cpu")
    wan = PipelineFolder.open(saved("wan"))
    with torch.no_grad():
        pixels = read_video(tmp_path / "clips" / "a.gif", 9)[None].float() / 127.5 - 1
        latents = wan.family.encode_images(wan.pipeline(), pixels)
    assert latents.shape[1:] == wan.family.shape(32, 32, 9)
    with pytest.raises(UserError, match="has no text encoder"):
        fewstep.encode(saved("wan"), tmp_path / "clips", tmp_path / "out", frames=9, device="cpu")


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_video_is_read_back_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    if suffix == "mp4":
        pytest.importorskip("av")
    shades = torch.arange(5, dtype=torch.uint8) * 40
    video = shades[:, None, None, None].expand(5, 3, 16, 32).contiguous()
    file = tmp_path / f"a.{suffix}"
    save_sample(video, file)
    decoded = read_video(file, 5)
    assert decoded.shape == (3, 5, 16, 32)
    assert image_size(file) == (16, 32)
    assert (decoded.transpose(0, 1).int() - video.int()).abs().max() <= 3
    assert read_video(file, 2, cover=(8, 8)).shape == (3, 2, 8, 8)
    with pytest.raises(UserError, match=r"a\.\w+ has 5 frames, 9 are needed"):
        read_video(file, 9)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.\w+ is not a readable video"):
        read_video(file, 1)
    with pytest.raises(UserError, match=r"a\.\w+ is not a readable image or video"):
        image_size(file)
