"""The metrics' networks against the packages that define them: the same random weights, in the real files' formats."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from worlds import tiny_teacher

from fewstep import load
from fewstep.core.errors import UserError
from fewstep.core.image_grid import save_sample
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.feature_statistics import collect, read_statistics, write_statistics
from fewstep.eval.images import ImageSet, InMemoryImages
from fewstep.eval.metrics.frechet import frechet_distance
from fewstep.eval.networks import clip, dinov2, i3d, inception
from fewstep.eval.networks.clip import Clip
from fewstep.eval.networks.dinov2 import DinoV2
from fewstep.eval.networks.efficientnet import EfficientNet
from fewstep.eval.networks.features import Features
from fewstep.eval.networks.i3d import I3d
from fewstep.eval.networks.inception import Inception, InceptionClasses
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol

pytest.importorskip("cleanfid")
torchvision = import_torchvision()
MODES = ("clean", "legacy_pytorch", "legacy_tensorflow")


def pictures(folder: Path, n: int, seed: int, size: int = 48) -> Path:
    """Smooth random colour pictures as PNG."""
    folder.mkdir()
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = F.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1).mul(255).byte()
    for k, image in enumerate(fine):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k:03d}.png")
    return folder


class Script(nn.Module):
    """The interface of NVIDIA's TorchScript file: ``layers`` for resized input, ``forward`` resizes inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 32, 9, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Flatten())
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = F.interpolate(img.float(), [299, 299], mode="bilinear", align_corners=False)
        features = self.layers((x - 128) / 128)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight)
        return F.softmax(logits if no_output_bias else logits + self.output.bias, dim=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both of Inception's files, of random networks."""
    from cleanfid import inception_pytorch

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    torch.jit.script(Script()).save(str(folder / inception.SCRIPT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = inception_pytorch.fid_inception_v3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), folder / inception.PORT)
    return folder


def cleanfids(mode: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """clean-fid's network of a mode on the same weights."""
    from cleanfid import features, inception_pytorch
    from cleanfid.inception_torchscript import InceptionV3W

    def script(path: str, download: bool, resize_inside: bool) -> InceptionV3W:
        return InceptionV3W(str(weights), download=False, resize_inside=resize_inside)

    state = torch.load(weights / inception.PORT, weights_only=True)
    monkeypatch.setattr(features, "InceptionV3W", script)
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
    return features.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)


@pytest.mark.parametrize("mode", MODES)
def test_fid_is_clean_fids_in_all_modes_and_statistics_are_exchanged_both_ways(
    mode: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import fid

    folders = [pictures(tmp_path / name, 10, seed) for seed, name in enumerate("ab")]
    theirs = cleanfids(mode, weights, monkeypatch)
    feats = [
        fid.get_folder_features(
            str(folder), theirs, 0, batch_size=8, device=torch.device("cpu"), mode=mode, verbose=False
        )
        for folder in folders
    ]
    # few images lie in a plane of few dimensions, within which scipy's root takes no minute
    plane = np.linalg.qr(np.concatenate(feats).T)[0]
    expected = fid.fid_from_feats(*(each @ plane for each in feats))

    network = Inception.load(mode, WeightsLocator((weights,)))
    known = [collect({"x": network}, ImageSet.open(folder), frozenset({"x"}))["x"] for folder in folders]
    assert frechet_distance(known[0].statistics, known[1].statistics) == pytest.approx(expected, rel=1e-3)
    torch.testing.assert_close(known[0].features(), torch.from_numpy(feats[0]), rtol=1e-3, atol=1e-4)

    np.savez(tmp_path / "theirs.npz", mu=feats[1].mean(0), sigma=np.cov(feats[1], rowvar=False))
    read = read_statistics(tmp_path / "theirs.npz", network)
    assert frechet_distance(known[0].statistics, read.statistics) == pytest.approx(expected, rel=1e-3)
    write_statistics(known[1], tmp_path / "ours.npz")
    ours = np.load(tmp_path / "ours.npz")  # as clean-fid reads it
    np.testing.assert_allclose(ours["mu"], feats[1].mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ours["sigma"], np.cov(feats[1], rowvar=False), rtol=1e-2, atol=1e-4)


def test_several_sizes_are_refused_where_the_network_resizes_inside(weights: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", 3, 0)
    Image.new("RGB", (40, 40)).save(folder / "small.png")
    assert (
        collect({"x": Inception.load("clean", WeightsLocator((weights,)))}, ImageSet.open(folder))["x"].statistics.count
        == 4
    )
    with pytest.raises(UserError, match="inception_legacy_tensorflow needs images of one size"):
        collect({"x": Inception.load("legacy_tensorflow", WeightsLocator((weights,)))}, ImageSet.open(folder))


def test_statistics_of_another_network_are_refused(weights: Path, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", 4, 0)
    networks = {mode: Inception.load(mode, WeightsLocator((weights,))) for mode in ("clean", "legacy_tensorflow")}
    for mode, known in collect(networks, ImageSet.open(folder)).items():
        write_statistics(known, tmp_path / f"{mode}.npz")
    with pytest.raises(UserError, match="features of inception_legacy_tensorflow, not of inception_clean"):
        read_statistics(tmp_path / "legacy_tensorflow.npz", networks["clean"])
    other = tmp_path / "other"
    other.mkdir()
    torch.manual_seed(1)
    torch.jit.script(Script()).save(str(other / inception.SCRIPT))
    with pytest.raises(UserError, match="with other weights"):
        read_statistics(tmp_path / "clean.npz", Inception.load("clean", WeightsLocator((other,))))
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(UserError, match="64 features, inception_clean has 2048"):
        read_statistics(tmp_path / "small.npz", networks["clean"])
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(UserError, match="neither mu and sigma nor feats"):
        read_statistics(tmp_path / "images.npz", networks["clean"])
    (tmp_path / "edm.npz").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="pickles are not read"):
        read_statistics(tmp_path / "edm.npz", networks["clean"])


def test_the_classes_are_probabilities_without_the_outputs_bias(weights: Path) -> None:
    network = Inception.load("legacy_tensorflow", WeightsLocator((weights,)))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    probabilities = InceptionClasses(network)(images)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    torch.testing.assert_close(probabilities, F.softmax(network(images) @ network.network.output.weight.T, dim=1))


@pytest.mark.parametrize("size", [(28, 28), (300, 300), (299, 299), (400, 60), (31, 1500)])
def test_resizing_is_clean_fids(size: tuple[int, int]) -> None:
    from cleanfid.resize import build_resizer

    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    theirs = build_resizer("clean")(image.permute(1, 2, 0).numpy())
    ours = inception.resized(image, 299).permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() < 2e-4  # of 255; they multiply in double precision


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_found_where_they_may_be_and_asked_for_where_they_are_not(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fewstep.eval.networks.inception.temporary", lambda: tmp_path / "no")
    monkeypatch.delenv("FEWSTEP_WEIGHTS", raising=False)
    with pytest.raises(UserError, match=r"inception-2015-12-05\.pt are not there\. Fetch https://\S+ and put it into"):
        Inception.load("clean", WeightsLocator.of())
    assert Inception.load("clean", WeightsLocator.of(weights)).name == "inception_clean"
    assert Inception.load("clean", WeightsLocator.of(weights / inception.SCRIPT)).dimension == 2048
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(weights))
    assert (
        Inception.load("clean", WeightsLocator.of()).sha256
        == Inception.load("legacy_tensorflow", WeightsLocator.of()).sha256
    )
    with pytest.raises(UserError, match="no such file or folder"):
        WeightsLocator.of(tmp_path / "missing")
    shutil.copy(weights / inception.PORT, tmp_path / inception.SCRIPT)
    with pytest.raises(UserError, match="holds no weights of Inception-V3"):
        Inception.load("clean", WeightsLocator.of(tmp_path))
    shutil.copy(weights / inception.SCRIPT, tmp_path / inception.PORT)
    with pytest.raises(UserError, match="holds no weights of Inception-V3"):
        Inception.load("legacy_pytorch", WeightsLocator.of(tmp_path))


# --- CLIP -------------------------------------------------------------------------------------------------------------

SMALL = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("clip") / f"{SMALL}.safetensors"
    save_file(open_clip.create_model(SMALL).state_dict(), file)
    return file


CAPTIONS = ["a red sneaker on blue", "two dogs and a very long street " * 20, "nothing"]


def seen_by(network: Features, images: Tensor) -> Tensor:
    return network(torch.stack([network.prepare(image) for image in images]))


def test_clip_scores_are_open_clips(clip_file: Path) -> None:
    import open_clip

    network = Clip.load(f"{SMALL}:{clip_file}", WeightsLocator())
    model, transform = open_clip.create_model_from_pretrained(SMALL, str(clip_file))
    images = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
    stack = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        seen = model.encode_image(stack, normalize=True)
        read = model.encode_text(open_clip.get_tokenizer(SMALL)(CAPTIONS), normalize=True)
    torch.testing.assert_close(seen_by(network, images), seen, rtol=0, atol=1e-6)
    torch.testing.assert_close(network.texts(CAPTIONS), read, rtol=0, atol=1e-6)
    assert network.dimension == seen.shape[1]
    squashed = Clip.load(f"{SMALL}:{clip_file}", WeightsLocator(), squash=True)
    assert not torch.allclose(seen_by(squashed, images), seen, atol=1e-3), "a wide picture is stretched, not cropped"
    raw = seen_by(Clip.load(f"{SMALL}:{clip_file}", WeightsLocator(), unit=False), images)
    torch.testing.assert_close(F.normalize(raw, dim=1), seen, rtol=0, atol=1e-5)


def test_the_prefix_is_put_before_a_caption_as_tokens(clip_file: Path) -> None:
    """A caption that fits is one with the words before it; of one that does not the end is cut."""
    network = Clip.load(f"{SMALL}:{clip_file}", WeightsLocator())
    torch.testing.assert_close(
        network.texts(CAPTIONS[:1], clip.PREFIX), network.texts([clip.PREFIX + CAPTIONS[0]]), rtol=0, atol=1e-6
    )
    assert not torch.allclose(network.texts(CAPTIONS[1:2], clip.PREFIX), network.texts(CAPTIONS[1:2]), atol=1e-4)


def test_unknown_and_missing_clip_models_are_refused(clip_file: Path, tmp_path: Path) -> None:
    for name, message in (
        ("ViT-B-33:openai", "Unknown CLIP model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ("ViT-B-32:opanai", "Unknown weights 'opanai' of ViT-B-32; did you mean 'openai'"),
        ("ViT-g-14:laion2b_s12b_b42k", r"ViT-g-14-laion2b_s12b_b42k\.safetensors are not there"),
        (f"ViT-B-32:{clip_file}", "holds no weights of ViT-B-32"),
    ):
        with pytest.raises(UserError, match=message):
            Clip.load(name, WeightsLocator())


def test_metrics_of_captions_by_a_protocol(clip_file: Path, tmp_path: Path) -> None:
    """Six images show three captions in turn: their cosines, and how alike the two of a caption are."""
    folder = pictures(tmp_path / "a", 6, 0)
    (tmp_path / "captions.txt").write_text("a red sneaker\na dog\nnothing\n")
    names = ("clip_score", "clip_score_dmd2", "similarity", "diversity")
    protocol = Protocol(
        name="own", metrics=names, clip=f"{SMALL}:{clip_file}", captions=str(tmp_path / "captions.txt"), n=6
    )
    values = ProtocolEvaluator(protocol, WeightsLocator()).values(protocol.images(folder))
    network = Clip.load(protocol.clip, WeightsLocator())
    (prepared,) = ImageSet.open(folder).batches(network.prepare)
    seen = network(torch.stack(prepared))
    captions = ["a red sneaker", "a dog", "nothing"]
    for name, prefix in (("clip_score", ""), ("clip_score_dmd2", clip.PREFIX)):
        cosines = (seen * network.texts(captions, prefix).repeat(2, 1)).sum(1)
        assert values[name] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert values["clip_score"] != pytest.approx(values["clip_score_dmd2"], abs=1e-4)
    assert values["similarity"] == pytest.approx((seen[:3] * seen[3:]).sum(1).mean().item(), abs=1e-5)
    assert values["diversity"] == pytest.approx((seen[:3] - seen[3:]).norm(dim=1).mean().item(), abs=1e-5)

    with pytest.raises(UserError, match="--skip-bad would give captions to the wrong images"):
        ProtocolEvaluator(protocol, WeightsLocator(), skip_bad=True)


# --- others -----------------------------------------------------------------------------------------------------------


def test_dinov2_reads_metas_file_and_resizes_its_positions_as_meta_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    torch.manual_seed(0)
    settings = {"embed_dim": 64, "depth": 2, "num_heads": 2}  # ViT-L in little
    large = timm.create_model("vit_large_patch14_dinov2", img_size=518, num_classes=0, pretrained=False, **settings)
    weights = large.state_dict() | {"mask_token": torch.zeros(1, 64)}
    torch.save(weights, tmp_path / dinov2.FILE)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: make(*a, **k, **settings))
    network = DinoV2.load(WeightsLocator((tmp_path,)))
    features = seen_by(network, torch.randint(0, 256, (2, 3, 50, 50), dtype=torch.uint8))
    assert features.shape == (2, 64)
    resized = dinov2.timms(weights)["pos_embed"]
    assert resized.shape == (1, 1 + 16 * 16, 64)
    torch.testing.assert_close(resized[:, 0], weights["pos_embed"][:, 0])
    torch.save({"a": torch.zeros(1)}, tmp_path / dinov2.FILE)
    with pytest.raises(UserError, match="holds no weights of DINOv2"):
        DinoV2.load(WeightsLocator((tmp_path,)))


class Videos(nn.Module):
    def forward(self, x: Tensor, rescale: bool, resize: bool, return_features: bool) -> Tensor:
        return x.mean([1, 3, 4])[:, :1].expand(-1, 400)


def test_i3d_sees_videos_of_224_pixels_between_minus_one_and_one(tmp_path: Path) -> None:
    torch.jit.script(Videos()).save(str(tmp_path / i3d.FILE))
    network = I3d.load(WeightsLocator((tmp_path,)))
    dark, light = torch.zeros(1, 12, 3, 30, 40, dtype=torch.uint8), torch.full((1, 12, 3, 30, 40), 255).byte()
    assert seen_by(network, torch.cat([dark, light]))[:, 0].tolist() == pytest.approx([-1, 1])
    with pytest.raises(UserError, match="videos of 10 frames or more"):
        network.prepare(dark[0, :4])


def test_fvd_is_of_videos_from_files_and_from_models(tmp_path: Path) -> None:
    torch.jit.script(Videos()).save(str(tmp_path / i3d.FILE))
    frames = (torch.arange(5) * 30).byte()[:, None, None, None, None].expand(5, 12, 3, 16, 16).contiguous()
    frames[:, range(12), :, range(12)] = 200  # a line that moves: GIF leaves out frames that repeat
    for k, video in enumerate(frames):
        save_sample(video, tmp_path / "real" / f"{k}.gif")
    protocol = Protocol(name="own", metrics=("fvd",), reference=str(tmp_path / "real"), n=5, frames=12)
    judge = ProtocolEvaluator(protocol, WeightsLocator((tmp_path,)))
    assert judge.values(protocol.images(tmp_path / "real"))["fvd"] == pytest.approx(0, abs=1e-3)
    assert judge.values(InMemoryImages([frames[:2], frames[2:]]))["fvd"] == pytest.approx(0, abs=1e-3)
    moved = 400 * (51 / 127.5) ** 2  # brighter by 51 of 255, in each of 400 features
    assert judge.values(InMemoryImages([frames + 51]))["fvd"] == pytest.approx(moved, rel=1e-3)
    with pytest.raises(UserError, match="looks at videos; this model draws images"):
        judge.check(load(tiny_teacher(tmp_path / "teacher"), "cpu"))


def test_efficientnet_knows_photographs_from_noise() -> None:
    """The one network with true weights here: features of likely pictures lie nearer to each other."""
    network: Features = EfficientNet.load()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1).mul(255).byte()
    noise = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    features = seen_by(network, torch.cat([smooth, noise]))
    assert features.shape == (8, network.dimension)
    distances = torch.cdist(features, features)
    assert distances[:4, :4].mean() < distances[:4, 4:].mean()
    assert distances[4:, 4:].mean() < distances[:4, 4:].mean()
