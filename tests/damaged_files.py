"""Every reader of files with one valid file, and damaged versions of that file: the input of the fault tests.

A reader either reads a file or raises ``UserError``. ``fuzz`` tries it on random bytes, on valid files with bytes
changed, cut, inserted and doubled, on valid JSON and YAML with values and keys replaced, and on tensors of other
names, types and shapes.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from worlds import tiny_config, tiny_teacher

from fewstep.api.bench_objectives import load_benchmark
from fewstep.core.errors import UserError
from fewstep.core.files import read_json_lines, read_json_object, read_metadata, read_prompts, read_table, tensor_names
from fewstep.core.image_files import image_size, read_image, read_video
from fewstep.core.yaml_files import dump_yaml
from fewstep.distill.config_files import load_config
from fewstep.distill.data.readers import IDX_FILES, read_idx, read_stored
from fewstep.eval.captions import Captions
from fewstep.eval.feature_statistics import contains_statistics, read_statistics
from fewstep.eval.images import ImageSet
from fewstep.eval.networks.classifier import Classifier, load_classifier, save_classifier
from fewstep.eval.protocol import load_protocol
from fewstep.eval.references import load_reference
from fewstep.eval.report.html import write_report
from fewstep.eval.report.run_files import read_metrics
from fewstep.eval.score_files import read_scores
from fewstep.eval.solver_comparison import read_results
from fewstep.models.hub.encoded import EncodedPrompts
from fewstep.models.hub.manifest import read_manifest
from fewstep.models.hub.weights import weight_files
from fewstep.models.loading import load_model
from fewstep.samplers.dc_solver import read_ratios
from fewstep.samplers.dpm_solver_v3 import Statistics

PIECES = [
    *("{", "}", "[", "]", ",", ":", ": ", "- ", "? ", "&a ", "*a", "<<: ", "!!int ", "!x ", "| ", "> ", "'", '"', "#"),
    *("\n", "\n  ", "\t", "\r", "---\n", "...\n", "%YAML 1.1\n", "\0", "\x85", "\ufeff", "\U0001f600", "\\", "seed"),
    *("1:30", "2020-13-45", "yes", "null", "~", ".nan", "-.inf", "1e999", "010", "0x", "9" * 40, "1e-4", "true"),
]
LEAVES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=5),
    st.sampled_from([10**18, 2**63, -(2**63), 10**400, "../x", "a:b", "nan", "__class__", "tdm", "unet"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64
)  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A function that reads ``file`` of a folder. ``create`` writes a valid folder, ``others`` generates contents of
    the file that belong to its format. ``slow`` readers are tried on a fiftieth of the inputs."""

    file: str
    create: Callable[[Path], object]
    read: Callable[[Path], object]
    others: Callable[[bytes], st.SearchStrategy[bytes]] | None = None
    slow: bool = False


# --- contents ---------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with a few bytes changed, cut, inserted or doubled."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        kind, at = (
            draw(st.sampled_from(["change", "cut", "insert", "double", "end"])),
            draw(st.integers(0, len(content))),
        )
        length = draw(st.integers(1, 64))
        if kind == "change":
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "double":
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@st.composite
def changed_value(draw: st.DrawFn, valid: Any) -> Any:
    """A value with some of what it contains replaced, removed or added."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        found = places(value)
        if not found or draw(st.integers(0, 30)) == 0:
            return draw(VALUES)
        container, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                container[key] = draw(VALUES)
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=5))] = draw(VALUES)
            case _:
                container.insert(key, draw(VALUES))
    return value


def changed_json(valid: bytes) -> st.SearchStrategy[bytes]:
    return changed_value(json.loads(valid)).map(lambda value: json.dumps(value).encode())


def changed_lines(valid: bytes) -> st.SearchStrategy[bytes]:
    """JSON lines with one of them changed."""
    first, *rest = valid.splitlines(keepends=True)
    return changed_json(first).map(lambda line: line + b"\n" + b"".join(rest))


def changed_yaml(valid: bytes) -> st.SearchStrategy[bytes]:
    """Changed values, or pieces of YAML inserted into the text."""
    pieces = st.lists(st.tuples(st.integers(0, len(valid)), st.sampled_from(PIECES)), min_size=1, max_size=6)

    def inserted(pieces: list[tuple[int, str]]) -> bytes:
        text = valid
        for at, piece in pieces:
            text = text[:at] + piece.encode() + text[at:]
        return text

    texts = st.lists(st.sampled_from(PIECES), max_size=20).map(lambda parts: "".join(parts).encode())
    return st.one_of(changed_json(json.dumps(to_json(valid)).encode()), pieces.map(inserted), texts)


def to_json(text: bytes) -> Any:
    from fewstep.core.yaml_files import parse_yaml

    return parse_yaml(text.decode(), "valid")


@st.composite
def arrays(draw: st.DrawFn, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of any type and small shape under some of the names, or one more."""
    found: dict[str, torch.Tensor] = {}
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    for name in names:
        if draw(st.integers(0, 9)):
            own = shape if draw(st.integers(0, 3)) else draw(st.lists(st.integers(0, 4), max_size=4))
            fill = draw(st.sampled_from([0.0, 1.0, 7.0, -1.0, float("nan"), float("inf")]))
            found[name] = torch.full(own, fill).to(draw(st.sampled_from(DTYPES)))
    return found if draw(st.integers(0, 9)) else {**found, "other": torch.zeros(1)}


def other_tensors(*names: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: arrays(names).map(save)


def other_arrays(*names: str) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    def write(tensors: dict[str, torch.Tensor]) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, **{n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()})
        return stream.getvalue()

    return lambda valid: arrays(names).map(write)


# --- valid files ------------------------------------------------------------------------------------------------------


def writer(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def json_writer(name: str, value: Any) -> Callable[[Path], object]:
    return writer(name, json.dumps(value))


def picture(kind: str, frames: int = 1) -> bytes:
    stream, numbers = io.BytesIO(), np.random.default_rng(0)
    images = [Image.fromarray(numbers.integers(0, 255, (6, 5, 3), dtype=np.uint8)) for _ in range(frames)]
    several = {"save_all": True, "append_images": images[1:]} if frames > 1 else {}
    images[0].save(stream, kind, **several)
    return stream.getvalue()


def archive(kind: str) -> bytes:
    stream, content = io.BytesIO(), picture("PNG")
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("0.png", content)
    elif kind == "tar":
        with tarfile.open(fileobj=stream, mode="w") as tar:
            entry = tarfile.TarInfo("0.png")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    else:
        np.savez(stream, arr_0=np.zeros((2, 3, 4, 3), np.uint8))
    return stream.getvalue()


def idx(name: str, compress: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def create(folder: Path) -> None:
        images = struct.pack(">HBBIII", 0, 8, 3, 2, 3, 3) + bytes(18)
        (folder / name).write_bytes(compress(images))
        (folder / IDX_FILES["train"][1]).write_bytes(struct.pack(">HBBI", 0, 8, 1, 2) + bytes(2))

    return create


def encoded(folder: Path) -> None:
    index = {"pipeline": "x", "encoders": "", "prompts": "", "count": 2, "rows": 2, "images": 2, "sizes": [[8, 8]]}
    json_writer("index.json", index)(folder)
    (folder / "null.safetensors").write_bytes(save({"text": torch.zeros(1, 3)}))
    (folder / "shard-00000.safetensors").write_bytes(save({"text": torch.zeros(2, 3)}))
    (folder / "images-00000.safetensors").write_bytes(save({"x0": torch.zeros(2, 4, 1, 1), "prompt": torch.arange(2)}))


def classifier(folder: Path) -> None:
    with torch.random.fork_rng():
        network = Classifier(1, 10, (2, 2, 2, 2), 4).eval()
    save_classifier(network, folder, name="x", shape=(1, 8, 8), training={})


def reference(folder: Path) -> None:
    classifier(folder)
    (folder / "test.safetensors").write_bytes(save({"features": torch.randn(9, 4, generator=torch.Generator())}))


def statistics(folder: Path) -> None:
    tensors = {"log_snr": torch.arange(3.0).double()} | {name: torch.ones(3, 2, dtype=torch.float64) for name in "lsb"}
    (folder / "s.safetensors").write_bytes(save(tensors, {"settings": '{"guidance": 1.0}'}))


def feature_statistics(folder: Path) -> None:
    np.savez(folder / "s.npz", mu=np.zeros(3), sigma=np.eye(3), n=np.array(9), feats=np.eye(3))


def run_folder(folder: Path) -> None:
    writer("config.yaml", dump_yaml({"seed": 1, "teacher": "x", "stages": [{"objective": {"name": "tdm"}}]}))(folder)
    json_writer("environment.json", {"processor": "x", "started": "y"})(folder)
    json_writer("eval.json", [SCORE])(folder)
    (folder / "metrics.jsonl").write_text(METRICS)


def settings_file(folder: Path) -> None:
    (folder / "run.yaml").write_text(dump_yaml(tiny_config(folder)))


def index_of_weights(folder: Path) -> None:
    json_writer("diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"a": "x.safetensors"}})(folder)
    (folder / "x.safetensors").touch()


class Features:
    """The network that statistics in the valid file are of."""

    name, dimension, sha256 = "x", 3, "0"


SCORE = {
    "model": "m", "role": "student", "solver": "s", "nfe": 1, "steps": 1, "guidance": 1.0, "metric": "fd_x",
    "value": 1.5, "n": 10, "seed": 0, "seconds": 1.0, "reference": "r", "features_sha256": "00",
}  # fmt: skip
SOLVER = {
    "model": "m", "solver": "s", "grid": "time", "nfe": 1, "budget": 1, "steps": 1, "guidance": 1.0, "error": 0.1,
    "n": 10, "seed": 0, "long": 10,
}  # fmt: skip
METRICS = "".join(json.dumps({"step": k, "seconds": 1.0, "loss/x": 0.5}) + "\n" for k in range(3))
BENCHMARK = {
    "out": "x", "evaluations": 10, "base": {"teacher": "fashion"}, "methods": {"a": {"stages": [{"objective": "tdm"}]}}
}  # fmt: skip
MANIFEST = {
    "form": "merged", "pipeline": "P", "network": "N", "base": "b", "base_sha256": "0", "shape": [4, 8, 8],
    "times": [1.0, 0.5], "rule": "renoise", "shift": 1.0,
}  # fmt: skip
IMAGES_IDX = IDX_FILES["train"][0]


def read_override(folder: Path) -> object:
    text = (folder / "o.txt").read_bytes().decode("utf-8", "replace")
    return load_config("configs/fashion/demo.yaml", [text])


def read_prompt(folder: Path) -> object:
    encoded = EncodedPrompts(folder)
    return encoded(torch.arange(min(len(encoded), 2)))


def read_image_set(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        images = ImageSet.open(folder / name, skip_bad=True, count=1)
        return [batch for batch in images.batches(lambda image: image)]

    return read


def image(kind: str, name: str) -> Reader:
    return Reader(name, writer(name, picture(kind)), lambda f: (image_size(f / name), read_image(f / name, 1, (4, 4))))


def lines_of(folder: Path) -> object:
    return read_json_lines(folder / "m.jsonl"), read_metrics(folder / "m.jsonl", [])


READERS: dict[str, Reader] = {
    "config": Reader("run.yaml", settings_file, lambda f: load_config(f / "run.yaml"), changed_yaml),
    "override": Reader("o.txt", writer("o.txt", "stages.0.roles.student.lr=1e-4"), read_override, changed_yaml),
    "benchmark": Reader("b.yaml", writer("b.yaml", dump_yaml(BENCHMARK)), lambda f: load_benchmark(f / "b.yaml"),
                        changed_yaml),
    "protocol": Reader("p.yaml", writer("p.yaml", "reference: fashion\nn: 100\nseeds: [0, 1]\n"),
                       lambda f: load_protocol(str(f / "p.yaml")), changed_yaml),
    "JSON object": Reader("s.json", json_writer("s.json", {"step": 3, "best": {"value": 1.0}}),
                          lambda f: read_json_object(f / "s.json"), changed_json),
    "JSON lines": Reader("m.jsonl", writer("m.jsonl", METRICS), lines_of, changed_lines),
    "model config": Reader("config.json", tiny_teacher, load_model, changed_json),
    "model weights": Reader("model.safetensors", tiny_teacher, load_model,
                            other_tensors("enter.weight", "time.0.bias")),
    "safetensors names": Reader("model.safetensors", tiny_teacher, lambda f: (
        tensor_names(f / "model.safetensors"), read_metadata(f / "model.safetensors"))),
    "encoded prompts, index": Reader("index.json", encoded, read_prompt, changed_json),
    "encoded prompts, shard": Reader("shard-00000.safetensors", encoded, read_prompt, other_tensors("text")),
    "encoded prompts, images": Reader("images-00000.safetensors", encoded, read_prompt, other_tensors("x0", "prompt")),
    "export manifest": Reader("fewstep.json", json_writer("fewstep.json", MANIFEST), read_manifest, changed_json),
    "index of weights": Reader("diffusion_pytorch_model.safetensors.index.json", index_of_weights,
        weight_files, changed_json),
    "scores": Reader("eval.json", json_writer("eval.json", [SCORE]), lambda f: read_scores(f / "eval.json"),
                     changed_json),
    "solver results": Reader("s.json", json_writer("s.json", [SOLVER]), lambda f: read_results(f / "s.json"),
                             changed_json),
    "DC-Solver ratios": Reader("r.json", json_writer("r.json", [
        {"steps": 5, "guidance": 1.0, "order": 2, "ratios": [1.0] * 5},
        {"steps": 8, "guidance": 1.0, "order": 2, "ratios": [1.0] * 8}]),
        lambda f: read_ratios(f / "r.json", 6, 1.0), changed_json),
    "DPM-Solver-v3 statistics": Reader("s.safetensors", statistics, lambda f: Statistics.read(f / "s.safetensors", 1.0),
                                       other_tensors("log_snr", "l", "s", "b")),
    "classifier": Reader("classifier.json", classifier, load_classifier, changed_json),
    "reference": Reader("test.safetensors", reference, lambda f: load_reference(str(f)), other_tensors("features")),
    "feature statistics": Reader("s.npz", feature_statistics, lambda f: (
        contains_statistics(f / "s.npz"), read_statistics(f / "s.npz", Features())),  # type: ignore[arg-type]
        other_arrays("mu", "sigma", "n", "feats", "network")),
    "PNG": image("PNG", "a.png"), "JPEG": image("JPEG", "a.jpg"), "WebP": image("WEBP", "a.webp"),
    "BMP": image("BMP", "a.bmp"),
    "GIF": Reader("a.gif", writer("a.gif", picture("GIF", 3)), lambda f: (
        image_size(f / "a.gif"), read_video(f / "a.gif", 2, (4, 4)))),
    "images in a zip": Reader("a.zip", writer("a.zip", archive("zip")), read_image_set("a.zip")),
    "images in a tar": Reader("a.tar", writer("a.tar", archive("tar")), read_image_set("a.tar")),
    "images in an npz": Reader("a.npz", writer("a.npz", archive("npz")), read_image_set("a.npz"),
                               other_arrays("arr_0", "arr_1")),
    "idx": Reader(IMAGES_IDX, idx(IMAGES_IDX, bytes), read_idx),
    "idx, gzipped": Reader(f"{IMAGES_IDX}.gz", idx(f"{IMAGES_IDX}.gz", gzip.compress), read_idx),
    "stored samples": Reader("s.safetensors", lambda f: (f / "s.safetensors").write_bytes(
        save({"x0": torch.zeros(2, 3), "labels": torch.arange(2)})), lambda f: read_stored(f / "s.safetensors", 3),
        other_tensors("x0", "labels", "images")),
    "prompts": Reader("p.txt", writer("p.txt", "a cat\na dög\n"), lambda f: read_prompts(f / "p.txt")),
    "captions, csv": Reader("c.csv", writer("c.csv", 'file,caption\na.png,"a, cat"\nb.png,dog\n'),
                            lambda f: Captions.read(f / "c.csv")),
    "captions, jsonl": Reader("c.jsonl", writer("c.jsonl", '{"file": "a", "caption": "b"}\n' * 2), lambda f: read_table(
        f / "c.jsonl", ("file", "caption")), changed_lines),
    "report, scores": Reader("eval.json", run_folder, write_report, changed_json, slow=True),
    "report, metrics": Reader("metrics.jsonl", run_folder, write_report, changed_lines, slow=True),
    "report, config": Reader("config.yaml", run_folder, write_report, changed_yaml, slow=True),
}  # fmt: skip


@dataclass
class Counts:
    """How many inputs were tried, read, and refused with ``UserError``; there is no other outcome."""

    inputs: int = 0
    read: int = 0
    refused: int = 0


def fuzz(reader: Reader, folder: Path, examples: int) -> Counts:
    """Reads ``examples`` versions of the reader's file. Raises whatever it raises but ``UserError``, with the smallest
    input that hypothesis finds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reader.create(folder)
    file, counts = folder / reader.file, Counts()
    valid = file.read_bytes()
    reader.read(folder)
    kinds = [damaged(valid), st.binary(max_size=64), st.binary(max_size=64).map(lambda tail: valid[:16] + tail)]
    if reader.others is not None:
        kinds += [reader.others(valid)] * 2

    @settings(
        max_examples=max(1, examples // 50) if reader.slow else examples, deadline=None, derandomize=True,
        database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.one_of(kinds))
    def check(content: bytes) -> None:
        file.write_bytes(content)
        counts.inputs += 1
        try:
            reader.read(folder)
            counts.read += 1
        except UserError:
            counts.refused += 1

    check()
    return counts
