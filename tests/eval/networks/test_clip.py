"""CLIP's embeddings against open_clip's, on random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from random_sets import write_images
from torch import Tensor

from fewstep.core.errors import UserError
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.evaluate_protocol import ProtocolEvaluator
from fewstep.eval.images import ImageSet
from fewstep.eval.networks.clip import PREFIX, Clip
from fewstep.eval.networks.registry import build_networks
from fewstep.eval.networks.weights import WeightsLocator
from fewstep.eval.protocol import Protocol

import_torchvision()
open_clip = pytest.importorskip("open_clip")
SMALL = "ViT-S-32-alt"
BICUBIC = Image.Resampling.BICUBIC
CAPTIONS = ["a red sneaker on blue", "two dogs and a very long street " * 20, "nothing"]


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with random weights, as MODEL:FILE."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("clip") / f"{SMALL}.safetensors"
    save_file(open_clip.create_model(SMALL).state_dict(), file)
    return f"{SMALL}:{file}"


def embed(network: Clip, images: Tensor) -> Tensor:
    return network(torch.stack([network.prepare(image) for image in images]))


def test_embeddings_equal_open_clips(clip_name: str) -> None:
    network = Clip.load(clip_name, WeightsLocator())
    model, transform = open_clip.create_model_from_pretrained(SMALL, clip_name.partition(":")[2])
    images = torch.randint(0, 256, (3, 3, 40, 60), dtype=torch.uint8)
    stack = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        expected = model.encode_image(stack, normalize=True)
        expected_texts = model.encode_text(open_clip.get_tokenizer(SMALL)(CAPTIONS), normalize=True)
    torch.testing.assert_close(embed(network, images), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(network.embed_texts(CAPTIONS), expected_texts, rtol=0, atol=1e-6)
    assert network.dimension == expected.shape[1]
    square = Clip.load(clip_name, WeightsLocator(), square=True)
    for image in images:
        cropped = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((10, 0, 50, 40)).resize((224, 224), BICUBIC)
        assert torch.equal(square.prepare(image), transform(cropped)), "the centred square is cropped, then resized"
    raw = embed(Clip.load(clip_name, WeightsLocator(), normalize=False), images)
    torch.testing.assert_close(F.normalize(raw, dim=1), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(raw, expected, atol=1e-3)


def test_the_prefix_is_inserted_before_a_caption_as_tokens(clip_name: str) -> None:
    """A caption that fits equals one that starts with the words; a longer one is cut at the end."""
    network = Clip.load(clip_name, WeightsLocator())
    with_words = network.embed_texts([PREFIX + CAPTIONS[0]])
    torch.testing.assert_close(network.embed_texts(CAPTIONS[:1], PREFIX), with_words, rtol=0, atol=1e-6)
    long = CAPTIONS[1:2]
    assert not torch.allclose(network.embed_texts(long, PREFIX), network.embed_texts(long), atol=1e-4)


def test_unknown_models_and_missing_or_wrong_weights_are_refused(clip_name: str) -> None:
    for name, message in (
        ("ViT-B-33:openai", "Unknown CLIP model 'ViT-B-33'; did you mean 'ViT-B-32'"),
        ("ViT-B-32:opanai", "Unknown weights 'opanai' of ViT-B-32; did you mean 'openai'"),
        ("ViT-g-14:laion2b_s12b_b42k", r"ViT-g-14-laion2b_s12b_b42k\.safetensors were not found"),
        (f"ViT-B-32:{clip_name.partition(':')[2]}", "does not contain the weights of ViT-B-32"),
    ):
        with pytest.raises(UserError, match=message):
            Clip.load(name, WeightsLocator())


def test_a_protocol_scores_captions_and_the_images_of_one_caption(clip_name: str, tmp_path: Path) -> None:
    """Six images show three captions in turn: their cosines, and how similar the two images of a caption are."""
    folder = write_images(tmp_path / "a", 6, 0)
    captions = ["a red sneaker", "a dog", "nothing"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    names = ("clip_score", "clip_score_dmd2", "similarity", "diversity")
    protocol = Protocol(name="own", metrics=names, clip=clip_name, captions=str(tmp_path / "captions.txt"), n=6)
    evaluator = ProtocolEvaluator(protocol, WeightsLocator())
    values = {score.metric: score.value for score in evaluator.of_images(folder, "images")}
    network = Clip.load(clip_name, WeightsLocator())
    (prepared,) = ImageSet.open(folder).batches(network.prepare)
    features = network(torch.stack(prepared))
    for name, prefix in (("clip_score", ""), ("clip_score_dmd2", PREFIX)):
        cosines = (features * network.embed_texts(captions, prefix).repeat(2, 1)).sum(1)
        assert values[name] == pytest.approx(cosines.mean().item(), abs=1e-5)
    assert values["clip_score"] != pytest.approx(values["clip_score_dmd2"], abs=1e-4)
    assert values["similarity"] == pytest.approx((features[:3] * features[3:]).sum(1).mean().item(), abs=1e-5)
    assert values["diversity"] == pytest.approx((features[:3] - features[3:]).norm(dim=1).mean().item(), abs=1e-5)

    with pytest.raises(UserError, match="--skip-bad would shift the captions"):
        ProtocolEvaluator(protocol, WeightsLocator(), skip_bad=True)
    for image in sorted(folder.iterdir())[5:]:
        image.unlink()
    with pytest.raises(UserError, match="5 scorable images, 6 are required"):
        evaluator.of_images(folder, "images")
    five = protocol.model_copy(update={"n": 5, "metrics": ("clip_score",)})
    with pytest.raises(UserError, match="5 images and 3 captions"):
        ProtocolEvaluator(five, WeightsLocator()).of_images(folder, "images")
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\n" + "".join(f"{k:03d}.png,{captions[(4 - k) % 3]}\n" for k in reversed(range(5))))
    paired = five.model_copy(update={"captions": str(table)})
    (score,) = ProtocolEvaluator(paired, WeightsLocator()).of_images(folder, "images")
    texts = network.embed_texts([captions[(4 - k) % 3] for k in range(5)])
    assert score.value == pytest.approx((features[:5] * texts).sum(1).mean().item(), abs=1e-5)
    assert score.captions_sha256


def test_each_metric_prepares_and_normalises_as_its_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """CMMD crops the centred square and resizes it; CLIP-FID takes embeddings that are not normalised."""
    loaded: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(Clip, "load", lambda name, *_, **settings: loaded.append((name, settings)))
    protocol = Protocol(name="own", metrics=("clip_score",), captions="a.txt", clip="ViT-B-32:openai", n=10)
    build_networks(["clip", "clip_fid", "cmmd"], protocol, WeightsLocator(), "cpu")
    assert loaded == [
        ("ViT-B-32:openai", {}),
        ("ViT-B-32:openai", {"normalize": False}),
        ("ViT-L-14-336:openai", {"square": True}),
    ]
