"""The user's own networks and teachers by dotted or registered name, and which of these a saved model may use."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fewstep
from fewstep.core import registry
from fewstep.core.errors import UserError
from fewstep.models.condition import Condition
from fewstep.models.loading import load_model, pipeline_of
from fewstep.models.model_config import ModelConfig
from fewstep.models.saving import save_model

SOURCE = """
from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import fewstep
from fewstep.models.backbone import Backbone
from fewstep.models.schedules import RectifiedFlow

Path(__file__).with_name("imported").touch()
calls = []


class Net(nn.Module):
    def __init__(self, width: int = 3, **others: object) -> None:
        super().__init__()
        self.settings = {"width": width, **others}
        self.hidden, self.out = nn.Linear(2, width), nn.Linear(width, 2)

    def forward(self, x_t, t, condition):
        return self.out(torch.tanh(self.hidden(x_t)))


class Shaped(Backbone):
    def __init__(self, shape, classes, depth) -> None:
        super().__init__()
        self.received = shape, classes, depth

    @classmethod
    def build(cls, shape, classes, **settings):
        return cls(shape, classes, **settings)


class NotANetwork:
    def __init__(self, **settings: object) -> None:
        calls.append("NotANetwork")


def not_a_class(**settings: object) -> nn.Module:
    calls.append("not_a_class")
    return Net()


def teacher() -> fewstep.Model:
    config = fewstep.ModelConfig(backbone={"name": "acme_networks:Net"}, shape=(2,))
    torch.manual_seed(0)
    return fewstep.Model(denoiser=fewstep.Denoiser(Net(), RectifiedFlow()), config=config)


def not_annotated():
    calls.append("not_annotated")
    return teacher()


def not_a_model() -> fewstep.Model:
    return Net()


TEACHER = teacher()
"""
CONFIG = ModelConfig(backbone={"name": "acme_networks:Net", "width": 4}, shape=(2,))
X_T = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the module path with ``acme_networks.py``, which leaves a file when it is imported."""
    (tmp_path / "acme_networks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_registered", {})
    yield tmp_path
    sys.modules.pop("acme_networks", None)


@pytest.fixture
def acme(folder: Path) -> ModuleType:
    """The user's module, imported."""
    return importlib.import_module("acme_networks")


def saved(acme: ModuleType, config: ModelConfig, folder: Path) -> Path:
    """A model with random weights, saved with ``config``."""
    denoiser = fewstep.Denoiser(acme.Net(config.backbone.get("width", 3)), acme.TEACHER.denoiser.schedule)
    save_model(denoiser, config, folder)
    return folder


def load_in_a_new_process(model: Path, path: Path) -> str:
    """The error of loading ``model`` where the module in ``path`` could be imported, but is not, and whether it is."""
    (path / "imported").unlink(missing_ok=True)
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r})\n"
        "from fewstep.core.errors import UserError\n"
        "from fewstep.models.loading import load_model\n"
        f"try:\n    load_model({str(model)!r})\n    print('loaded')\nexcept UserError as error:\n    print(error)\n"
        "print('imported' if 'acme_networks' in sys.modules else 'not imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- networks


def test_a_saved_model_never_imports_the_module_of_its_network(acme: ModuleType, folder: Path) -> None:
    printed = load_in_a_new_process(saved(acme, CONFIG, folder / "model"), folder)
    assert "uses the backbone 'acme_networks:Net', which has not been imported" in printed
    assert "import acme_networks first" in printed
    assert printed.endswith("not imported\n")
    assert not (folder / "imported").exists()


def test_a_saved_model_loads_once_the_module_of_its_network_is_imported(acme: ModuleType, folder: Path) -> None:
    model = load_model(saved(acme, CONFIG, folder / "model"))
    assert type(model.denoiser.backbone) is acme.Net
    weights = fewstep.load(folder / "model", "cpu").denoiser.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in model.denoiser.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "os:system", "posix:system", "subprocess:run", "builtins:exec", "torch.nn.functional:relu",
        "collections:OrderedDict", "acme_networks:NotANetwork", "acme_networks:not_a_class", "acme_networks:calls",
    ],
)  # fmt: skip
def test_a_saved_model_cannot_call_anything_but_a_network(acme: ModuleType, folder: Path, name: str) -> None:
    model = saved(acme, CONFIG, folder / "model")
    config = CONFIG.model_copy(update={"backbone": {"name": name, "command": "false", "args": "false"}})
    (model / "config.json").write_text(config.model_dump_json(exclude_none=True))
    with pytest.raises(UserError, match=r"is not a subclass of torch.nn.Module|has not been imported") as caught:
        load_model(model)
    assert str(model / "config.json") in str(caught.value)
    assert acme.calls == []


def test_an_own_network_receives_exactly_the_settings_in_the_config(folder: Path) -> None:
    config = CONFIG.model_copy(update={"backbone": {"name": "acme_networks:Net", "width": 5, "mode": "fast"}})
    assert config.build().backbone.settings == {"width": 5, "mode": "fast"}


def test_an_own_subclass_of_backbone_also_receives_shape_and_classes(folder: Path) -> None:
    config = ModelConfig(backbone={"name": "acme_networks:Shaped", "depth": 2}, shape=(3, 8, 8), classes=10)
    assert config.build().backbone.received == ((3, 8, 8), 10, 2)


def test_a_saved_model_may_use_a_registered_name(acme: ModuleType, folder: Path) -> None:
    config = CONFIG.model_copy(update={"backbone": {"name": "acme", "width": 4}})
    model = saved(acme, config, folder / "model")
    with pytest.raises(UserError, match=r"Unknown backbone 'acme'.*known: unet.*fewstep --import MODULE"):
        load_model(model)
    fewstep.register("backbone", "acme")(acme.Net)
    assert load_model(model).denoiser.backbone.settings == {"width": 4}
    with pytest.raises(UserError, match=r"did you mean 'acme'\? \(known: acme, unet, video_unet\)\.$"):
        ModelConfig(backbone={"name": "acmee"}, shape=(2,)).build()


# ---- teachers


@pytest.mark.parametrize("name", ["teacher", "TEACHER"], ids=["function", "model"])
def test_a_dotted_name_loads_the_users_own_model(folder: Path, name: str) -> None:
    """The user named it, so that its module is imported."""
    model = load_model(f"acme_networks:{name}", feature_layers=("hidden",))
    acme = sys.modules["acme_networks"]
    assert type(model.denoiser.backbone) is acme.Net
    prediction = model.denoiser(X_T, 0.5, Condition())
    torch.testing.assert_close(prediction.raw, acme.TEACHER.denoiser(X_T, 0.5, Condition()).raw)
    assert set(prediction.features) == {"hidden"}
    assert acme.TEACHER.denoiser(X_T, 0.5, Condition()).features == {}, "the user's own object is not changed"


def test_a_registered_name_loads_the_users_own_model(acme: ModuleType) -> None:
    fewstep.register("teacher", "acme")(acme.teacher)
    assert type(load_model("acme").denoiser.backbone) is acme.Net


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not_annotated", r"is not a fewstep.Model or a function annotated to return one \(def f\(\) -> Model\)"),
        ("Net", "is not a fewstep.Model or a function"),
        ("not_a_model", "returns a Net, not a fewstep.Model"),
        ("missing", "cannot be imported: AttributeError"),
    ],
)
def test_a_name_that_gives_no_model_is_refused(acme: ModuleType, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(f"acme_networks:{name}")
    assert acme.calls == []


def based(acme: ModuleType, base: str, folder: Path) -> Path:
    """A model with the network of ``base`` and other weights."""
    config = ModelConfig(backbone={"name": "acme_networks:Net"}, shape=(2,), base=base)
    torch.manual_seed(1)
    return saved(acme, config, folder / "student")


@pytest.mark.parametrize("name", ["teacher", "TEACHER"], ids=["function", "model"])
def test_a_saved_model_never_imports_the_module_of_its_base(acme: ModuleType, folder: Path, name: str) -> None:
    student = based(acme, f"acme_networks:{name}", folder)
    printed = load_in_a_new_process(student, folder)
    assert f"uses the teacher 'acme_networks:{name}', which has not been imported" in printed
    assert printed.endswith("not imported\n")
    assert not (folder / "imported").exists()


@pytest.mark.parametrize("name", ["teacher", "TEACHER"], ids=["function", "model"])
def test_a_saved_model_loads_once_the_module_of_its_base_is_imported(acme: ModuleType, folder: Path, name: str) -> None:
    before = acme.TEACHER.denoiser(X_T, 0.5, Condition()).raw
    model = load_model(based(acme, f"acme_networks:{name}", folder))
    assert not torch.equal(model.denoiser(X_T, 0.5, Condition()).raw, before)
    assert torch.equal(acme.TEACHER.denoiser(X_T, 0.5, Condition()).raw, before), "the teacher keeps its weights"
    with pytest.raises(UserError, match="is unconditional: it takes no prompts"):
        pipeline_of(model)


@pytest.mark.parametrize("base", ["os:system", "os:abort", "posix:abort", "sys:exit", "acme_networks:not_annotated"])
def test_a_saved_model_cannot_call_anything_as_its_base_but_a_teacher(
    acme: ModuleType, folder: Path, base: str
) -> None:
    with pytest.raises(UserError, match=r"is not a fewstep.Model or a function|has not been imported"):
        load_model(based(acme, base, folder))
    assert acme.calls == []


def test_an_own_model_is_loaded_in_eval_mode(acme: ModuleType) -> None:
    acme.TEACHER.denoiser.train()
    assert not load_model("acme_networks:TEACHER").denoiser.training
    assert acme.TEACHER.denoiser.training, "a copy was loaded"
