"""CLIP through open_clip (Cherti et al., arXiv 2212.07143): image and text embeddings of unit length.

A network is named ``MODEL:TAG`` as in open_clip's list (``ViT-g-14:laion2b_s12b_b42k``), or ``MODEL:FILE``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewstep.core.errors import UserError, nearest
from fewstep.core.torchvision_compat import import_torchvision
from fewstep.eval.images import centre_square
from fewstep.eval.networks.weights import LoadedWeights, WeightsLocator, reading_weights

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
PREFIX = "A photo depicts "
END = 49407  # CLIP's end-of-text token, whose output is the text's embedding


@dataclass(frozen=True)
class Clip(LoadedWeights):
    """Embeddings of images and of captions.

    Images are resized and cropped by the model's evaluation transform or, with ``square``, cropped to their centred
    square and then resized (for CMMD, as in its paper's code). Without ``normalize`` the embeddings of images keep
    their length (for CLIP-FID).
    """

    name: str
    tokenizer: Any
    transform: Any
    square: bool = False
    normalize: bool = True

    @classmethod
    def load(
        cls, name: str, locator: WeightsLocator, device: torch.device | str = "cpu", *, square: bool = False,
        normalize: bool = True,
    ) -> Clip:  # fmt: skip
        """Raises ``UserError`` on an unknown model or tag, and on weights that are missing or do not fit."""
        import_torchvision()
        import open_clip

        model, _, tag = name.partition(":")
        variant = f"{'_square' * square}{'_raw' * (not normalize)}"
        if model not in open_clip.list_models():
            raise UserError(f"Unknown CLIP model {model!r}{nearest(model, open_clip.list_models())}.")
        is_file = Path(tag).is_file()  # the hash of the weights, not their path, is part of a score's identity
        file = Path(tag) if is_file else _find_weights(model, tag, locator)
        with reading_weights(file, model):
            network, transform = open_clip.create_model_from_pretrained(
                model, str(file), device=device, force_quick_gelu=tag == "openai"
            )
        return cls.from_file(
            file, network, device, name=f"clip_{model if is_file else name}{variant}",
            tokenizer=open_clip.get_tokenizer(model), transform=transform, square=square, normalize=normalize,
        )  # fmt: skip

    @property
    def dimension(self) -> int:
        return int(self.network.text_projection.shape[-1])

    @property
    def side(self) -> int:
        size = self.network.visual.image_size
        return int(size[0] if isinstance(size, tuple) else size)

    def prepare(self, image: Tensor) -> Tensor:
        pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
        if self.square:
            pixels = centre_square(pixels).resize((self.side, self.side), Image.Resampling.BICUBIC)
        prepared: Tensor = self.transform(pixels)
        return prepared

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.network.encode_image(images.to(self.device)).float()
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str], prefix: str = "", batch: int = 256) -> Tensor:
        """Unit embeddings of captions [N, D]. The tokens of ``prefix`` are inserted before each caption, and tokens
        that no longer fit are cut."""
        tokens = self.tokenizer(list(captions))
        if prefix:
            words = self.tokenizer([prefix])[0]
            inserted = words[1 : int((words == END).nonzero()[0])]  # without start and end of text
            length = tokens.shape[1]
            tokens = torch.cat([tokens[:, :1], inserted.expand(len(tokens), -1), tokens[:, 1:]], 1)[:, :length]
            tokens[:, -1] = torch.where(tokens[:, -1] > 0, END, 0)
        parts = [self.network.encode_text(part.to(self.device)).float() for part in tokens.split(batch)]
        return F.normalize(torch.cat(parts), dim=-1)


def _find_weights(model: str, tag: str, locator: WeightsLocator) -> Path:
    """The weights of a tag, from open_clip's cache or found by ``locator``. Raises ``UserError`` on an unknown tag or
    missing weights."""
    import open_clip

    known = open_clip.list_pretrained_tags_by_model(model)
    if tag not in known:
        raise UserError(f"Unknown weights {tag!r} of {model}{nearest(tag, known)}; a file is given as {model}:FILE.")
    settings = open_clip.get_pretrained_cfg(model, tag)
    repository, _, file = settings.get("hf_hub", "").rpartition("/")
    names = [file] if file else list(FILES)
    if repository and (cached := find_cached(repository, names)):
        return cached
    if locator.download:
        return Path(open_clip.download_pretrained(settings))
    url = f"https://huggingface.co/{repository}" if repository else settings.get("url", "")
    return locator.find(f"{model}-{tag}.safetensors", f"{names[0]} of {url}")


def find_cached(repository: str, names: Sequence[str] = FILES) -> Path | None:
    """The first of these files of a repository in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(repository, name) for name in names)
    return next((Path(file) for file in found if isinstance(file, str)), None)
