"""Every reader of files, with a valid file for it: the input of the fault tests."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damaged_files import Reader, changed_json, changed_lines, changed_yaml, other_arrays, other_tensors
from PIL import Image
from safetensors.torch import save
from worlds import tiny_config, tiny_teacher

from fewstep.api.bench_objectives import load_benchmark
from fewstep.core.files import read_metadata, read_prompts, tensor_names
from fewstep.core.idx_files import IDX_FILES, read_idx
from fewstep.core.image_files import image_size, read_image, read_video
from fewstep.core.json_files import read_json_lines, read_json_object
from fewstep.core.tables import read_table
from fewstep.core.yaml_files import dump_yaml
from fewstep.distill.config_files import load_config
from fewstep.distill.data.stored_files import read_stored
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


def training_statistics(folder: Path) -> None:
    classifier(folder)
    tensors = {"mean": torch.zeros(4), "covariance": torch.eye(4), "count": torch.tensor([9])}
    (folder / "train.safetensors").write_bytes(save(tensors))


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
    "reference of training images": Reader("train.safetensors", training_statistics, lambda f: load_reference(
        str(f), "train"), other_tensors("mean", "covariance", "count", "features")),
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
