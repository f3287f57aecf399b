# mypy: ignore-errors
"""Creates the pipeline of the ``fashion-text`` teacher, in the format of Stable Diffusion, without a trained denoiser.

    python benchmarks/make_fashion_text.py FASHION_MNIST_FOLDER OUT

writes OUT/pipeline (a small VAE, trained here; a tokenizer of the captions' words; a CLIP text encoder with random
weights, which are never trained: enough to distinguish thirty words; a denoiser with random weights) and OUT/images,
tinted images with captions. Then run

    fewstep data encode OUT/images --teacher OUT/pipeline --out OUT/encoded
    fewstep train configs/fashion_text/teacher.yaml teacher=OUT/pipeline data.path=OUT/encoded
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.core.idx_files import read_idx
from fewstep.core.image_files import to_unit
from fewstep.eval.toy_captions import CaptionSet, tint

WIDTH, TOKENS = 64, 16


def tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the captions is one token."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", special_tokens=["<|startoftext|>", "<|endoftext|>"]
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocabulary.write_text(json.dumps(learned["vocab"]))
        merges.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in learned["merges"]))
        return CLIPTokenizer(str(vocabulary), str(merges), model_max_length=TOKENS)


def text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id,
    )  # fmt: skip
    encoder = CLIPTextModel(config)
    for name, parameter in encoder.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)  # CLIP's own 0.02 is too small against the layers' biases
    return encoder.eval()


def train_vae(images: Tensor, labels: Tensor, steps: int = 3000, batch: int = 48) -> AutoencoderKL:
    """Trains with the absolute difference and a small KL term, on images with new random tints in every batch."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_num_groups=8, sample_size=32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        x = to_unit(tint(images[rows], CaptionSet.sample(labels[rows], generator)))
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = F.l1_loss(out, x) + 1e-5 * posterior.kl().mean() / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if step % 200 == 199:
            print(f"vae {step + 1}/{steps}: {F.l1_loss(out, x).item():.4f}", flush=True)
    vae.eval()
    with torch.no_grad():
        some = torch.arange(2000)
        latents = vae.encode(to_unit(tint(images[some], CaptionSet.sample(labels[some], generator)))).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def main(source: str, out: Path, count: int = 30_000) -> None:
    torch.manual_seed(0)
    images, labels = read_idx(source, "train")
    words = tokenizer(CaptionSet.all().captions)
    encoder = text_encoder(words)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=4,
        norm_num_groups=8,
    )  # fmt: skip
    print(f"denoiser: {sum(p.numel() for p in unet.parameters()):,} parameters", flush=True)
    scheduler = DDIMScheduler(
        1000, 0.00085, 0.012, "scaled_linear", clip_sample=False, steps_offset=1, prediction_type="v_prediction"
    )
    pipeline = StableDiffusionPipeline(
        vae=train_vae(images, labels), text_encoder=encoder, tokenizer=words, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(out / "pipeline")
    (out / "images").mkdir()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(len(images), generator=generator)[:count]
    captions = CaptionSet.sample(labels[rows], generator)
    for number, (image, caption) in enumerate(zip(tint(images[rows], captions), captions.captions, strict=True)):
        file = out / "images" / f"{number:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        file.with_suffix(".txt").write_text(caption)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
