"""The video U-Net: what it shares with the image U-Net, its layers over frames, and causality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.errors import UserError
from fewstep.models.adapters import share_network
from fewstep.models.attention import AttentionLayer, Backend, attention, runs
from fewstep.models.condition import Condition
from fewstep.models.denoiser import Denoiser
from fewstep.models.model_config import ModelConfig
from fewstep.models.schedules import RectifiedFlow
from fewstep.models.unet import UNet
from fewstep.models.video_unet import TemporalAttention, TemporalConv, VideoUNet

TINY = {"widths": (8, 16), "blocks": (1, 1), "embedding": 8, "heads": 2, "classes": 0, "vocabulary": 5, "channels": 3}
FRAMES = 5
X_T = torch.randn(2, 3, FRAMES, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.3, 0.8], dtype=torch.float64)
WORDS = Condition({"words": torch.tensor([[1, 2], [3, 0]])}, {"words": torch.zeros(2, dtype=torch.int64)})


def perturbed(network: nn.Module) -> nn.Module:
    """Perturbs every weight: zero-initialised layers hide the rest of a new network."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def network(**settings: object) -> nn.Module:
    return perturbed(VideoUNet(**{**TINY, **settings}))


def test_the_size_of_the_emoji_video_model() -> None:
    settings = {"widths": [48, 96, 192], "blocks": [2, 2, 2], "patch": 2, "embedding": 128, "heads": 4}
    with torch.device("meta"):
        model = VideoUNet.build((3, 8, 32, 32), 0, vocabulary=147, **settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(3.73e6, rel=0.01)


@pytest.mark.parametrize("causal", [False, True])
def test_a_new_network_with_an_image_models_weights_draws_independent_images(causal: bool) -> None:
    images, videos = perturbed(UNet(**TINY)), VideoUNet(**TINY, causal=causal)
    unexpected = videos.load_state_dict(images.state_dict(), strict=False).unexpected_keys
    assert not unexpected, "weights keep their names"
    each = [images(X_T[:, :, k], T, WORDS) for k in range(FRAMES)]
    torch.testing.assert_close(videos(X_T, T, WORDS), torch.stack(each, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "shape"),
    [({}, (3, 5, 8, 12)), ({"widths": (8,), "blocks": (2,)}, (3, 1, 8, 8)), ({"channels": 1}, (1, 3, 16, 8))],
)
def test_videos_keep_their_shape_with_any_number_of_frames(settings: dict[str, object], shape: tuple[int, ...]) -> None:
    assert network(**settings)(torch.zeros(2, *shape), T, WORDS).shape == (2, *shape)


def test_attention_over_frames_is_at_all_levels_but_the_finest_of_several() -> None:
    def widths(**settings: object) -> list[int]:
        return [m.norm.num_channels for m in network(**settings).modules() if isinstance(m, TemporalAttention)]

    assert widths(widths=(8, 16, 32), blocks=(1, 1, 2)) == [16, 32, 32, 16]
    assert widths(widths=(8,), blocks=(2,)) == [8, 8]


def test_a_layer_over_frames_is_the_sum_over_frames_that_it_stands_for() -> None:
    layer = perturbed(TemporalConv(8, causal=False))
    x = torch.randn(2, 8, FRAMES, 3, 4, generator=torch.Generator().manual_seed(0))
    h = torch.stack([nn.functional.silu(layer.norm(x[:, :, k])) for k in range(FRAMES)], 2)
    zeros = torch.zeros_like(h[:, :, :1])
    padded = torch.cat([zeros, h, zeros], 2)
    taps = [torch.einsum("oi,bifhw->bofhw", layer.conv.weight[:, :, k, 0], padded[:, :, k : k + FRAMES])
            for k in range(3)]  # fmt: skip
    expected = x + sum(taps) + layer.conv.bias[:, None, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_over_frames_mixes_the_frames_of_one_position(causal: bool) -> None:
    layer = perturbed(TemporalAttention(8, 2, context=99 if causal else None))
    x = torch.randn(2, 8, FRAMES, 3, 4, generator=torch.Generator().manual_seed(0))
    qkv = torch.stack([layer.qkv(layer.norm(x[:, :, k])) for k in range(FRAMES)], 2)[:, :, :, 1, 2]  # [B, 3 C, F]
    q, k, v = qkv.reshape(2, 3, 2, 4, FRAMES).unbind(1)  # [B, heads, D, F]
    scores = torch.einsum("bhdf,bhdg->bhfg", q, k) / 2
    if causal:
        scores = scores.masked_fill(torch.ones(FRAMES, FRAMES).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("bhfg,bhdg->bhdf", scores.softmax(-1), v).reshape(2, 8, FRAMES)
    expected = x[:, :, :, 1, 2] + layer.out.weight[:, :, 0, 0] @ mixed + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x)[:, :, :, 1, 2], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "math", "efficient", "flash", "flex"])
@pytest.mark.parametrize(("queries", "context"), [(7, 7), (7, 99), (7, 3), (2, 99), (2, 4), (1, 4), (1, 99), (3, 1)])
def test_causal_attention_of_every_backend(backend: Backend, queries: int, context: int) -> None:
    if backend == "flex" or runs(backend, torch.device("cpu")):  # flex without a gradient runs everywhere
        q, k, v = torch.randn(3, 2, 3, 7, 16, generator=torch.Generator().manual_seed(0))
        q = q[:, :, -queries:]
        ages = torch.arange(7 - queries, 7)[:, None] - torch.arange(7)
        scores = (q @ k.transpose(2, 3) / 4).masked_fill((ages < 0) | (ages >= context), -torch.inf)
        out = attention(q, k, v, backend, context=context)
        torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-5, atol=1e-5)


def influence(model: nn.Module) -> Tensor:
    """How much each frame of the output [i] depends on each frame of the input [j]."""
    x = X_T.clone().requires_grad_()
    out = model(x, T, WORDS)
    rows = [torch.autograd.grad(out[:, :, i].square().sum(), x, retain_graph=True)[0] for i in range(FRAMES)]
    return torch.stack([row.abs().amax((0, 1, 3, 4)) for row in rows])


def test_every_frame_depends_on_all_frames() -> None:
    assert (influence(network()) > 1e-7).all()


def test_a_frame_of_a_causal_network_depends_on_the_frames_up_to_it_alone() -> None:
    found = influence(network(causal=True))
    assert (found.tril() > 1e-7).sum() == FRAMES * (FRAMES + 1) // 2
    assert found.triu(1).eq(0).all()


def test_later_frames_do_not_change_earlier_ones_of_a_causal_network() -> None:
    model, changed = network(causal=True), X_T.clone()
    changed[:, :, 3:] = 7.0
    before, after = model(X_T, T, WORDS), model(changed, T, WORDS)
    assert after[:, :, :3].equal(before[:, :, :3])
    torch.testing.assert_close(model(X_T[:, :, :3], T, WORDS), before[:, :, :3])
    assert ((after - before)[:, :, 3:].abs().amax((0, 1, 3, 4)) > 1e-4).all()


def storage(past: tuple[Tensor, ...]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in past)


@pytest.mark.parametrize("context", [None, 1, 2, 3, 99])
@pytest.mark.parametrize("parts", [[1] * FRAMES, [2, 3], [3, 1, 1], [FRAMES]])
def test_frames_one_after_the_other_equal_all_at_once(context: int | None, parts: list[int]) -> None:
    model, past, outputs = network(causal=True, context=context), None, []
    times = torch.tensor([[0.0, 0.3, 0.1, 0.9, 1.0], [0.2, 0.0, 0.0, 0.5, 0.7]], dtype=torch.float64)
    times = times[:, None, :, None, None]
    for x, t in zip(X_T.split(parts, 2), times.split(parts, 2), strict=True):
        out, past = model.after(past, x, t, WORDS)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), model(X_T, times, WORDS), rtol=1e-5, atol=1e-5)


def test_an_evaluation_without_keeping_its_frames_changes_nothing() -> None:
    """As an autoregressive sampler does: several noise levels of a frame see the same clean frames."""
    model = network(causal=True)
    _, past = model.after(None, X_T[:, :, :3], torch.zeros(2, dtype=torch.float64), WORDS)
    before = [tensor.clone() for tensor in past]
    first, _ = model.after(past, X_T[:, :, 3:4], T, WORDS)
    again, _ = model.after(past, X_T[:, :, 3:4], T, WORDS)
    assert first.equal(again)
    assert all(a.equal(b) for a, b in zip(before, past, strict=True))


def test_the_memory_of_earlier_frames_does_not_grow_with_a_context() -> None:
    model, past, sizes = network(causal=True, context=4), None, []
    with torch.no_grad():
        for _ in range(3 * FRAMES):
            _, past = model.after(past, X_T[:, :, :1], T, WORDS)
            sizes.append(storage(past))
    assert sizes[0] < sizes[2] == sizes[3] == sizes[-1]
    _, past = model.after(None, X_T, T, WORDS)
    assert storage(past) == sizes[-1] == sum(4 * tensor.numel() for tensor in past), "no more than is needed is kept"
    assert past[0].shape == (2, 8, 2, 4 * 4)
    assert past[2].shape == (2, 4, 2, 2, 3, 8), "the batch is the first axis"


@pytest.mark.parametrize("settings", [{"context": 4}, {"causal": True, "context": 0}])
def test_a_context_that_cannot_act_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="for a causal network"):
        network(**settings)


def test_a_network_that_is_not_causal_has_no_frames_one_after_the_other() -> None:
    with pytest.raises(ValueError, match="depend on later ones"):
        network().after(None, X_T, T, WORDS)


def test_a_limited_context_is_the_attention_of_a_window() -> None:
    found = influence(network(causal=True, context=1, widths=(8,), blocks=(1,)))
    assert found[4, 1].eq(0), "attention sees the frame alone, the convolution two frames before"
    assert (found[4, 2:] > 1e-7).all()
    assert influence(network(causal=True, widths=(8,), blocks=(1,)))[4, 0] > 1e-7


def test_one_time_per_frame() -> None:
    denoiser = Denoiser(network(causal=True), RectifiedFlow())
    times = torch.linspace(0, 1, FRAMES, dtype=torch.float64).expand(2, -1)[:, None, :, None, None]
    same = T[:, None, None, None, None].expand(-1, 1, FRAMES, 1, 1)
    torch.testing.assert_close(denoiser(X_T, same, WORDS).x0, denoiser(X_T, T, WORDS).x0)
    first = times.clone()
    first[:, :, 1:] = 0.5
    out, other = denoiser(X_T, times, WORDS), denoiser(X_T, first, WORDS)
    assert out.raw[:, :, 0].equal(other.raw[:, :, 0])
    assert (out.raw - other.raw)[:, :, 1].abs().max() > 1e-4
    torch.testing.assert_close(out.x0, (X_T - times * out.raw).float())


@pytest.mark.parametrize("shape", [(2, 1, 1, 1, 1), (2, 3, 1, 1, 1), (2, 1, FRAMES, 8, 1), (2, FRAMES)])
def test_times_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="times of shape"):
        network()(X_T, torch.zeros(shape, dtype=torch.float64), WORDS)


def test_gradients_reach_every_parameter() -> None:
    model = network()
    model(X_T, T, WORDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_every_word_counts_in_every_frame() -> None:
    model = network()
    other = WORDS.replace(words=torch.tensor([[1, 4], [3, 4]]))
    assert ((model(X_T, T, WORDS) - model(X_T, T, other)).abs().amax((1, 3, 4)) > 1e-4).all()
    assert WORDS.repeat(2)["words"].tolist() == [[1, 2], [1, 2], [3, 0], [3, 0]]
    assert WORDS.repeat(2).nulls is WORDS.nulls


def test_features_have_the_batch_in_front() -> None:
    denoiser = Denoiser(network(), RectifiedFlow(), feature_layers=["auto"])
    (features,) = denoiser(X_T, T, WORDS).features.values()
    assert features.shape == (2, 16, FRAMES, 2, 2)


def test_adapters_and_attention_backends_reach_the_layers_over_frames() -> None:
    pytest.importorskip("peft")
    denoiser = Denoiser(network(), RectifiedFlow())
    assert sum(isinstance(module, AttentionLayer) for module in denoiser.modules()) == 2
    expected = denoiser(X_T, T, WORDS).raw
    share_network(denoiser, 2, None, None)
    student = denoiser.backbone.fork()
    adapted = {name for name, _ in student.named_parameters()}
    assert any("temporal.1.0.conv.lora" in name for name in adapted)
    assert any("temporal.1.1.qkv.lora" in name for name in adapted)
    torch.testing.assert_close(student(X_T, T, WORDS), expected)


@pytest.mark.parametrize(
    ("name", "shape", "settings", "message"),
    [
        ("video_unet", (3, 32, 32), {}, r"axes \[C, F, H, W\], not \[3, 32, 32\]"),
        ("unet", (3, 8, 32, 32), {}, r"axes \[C, H, W\], not \[3, 8, 32, 32\]"),
        ("video_unet", (3, 8, 32, 32), {"widths": [8, 24, 32], "blocks": [1, 1, 1], "heads": 16}, "multiples of heads"),
        ("video_unet", (3, 8, 32, 32), {"causl": True}, "causl"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    name: str, shape: tuple[int, ...], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(backbone={"name": name, **settings}, shape=shape).build()
