"""CLIP-FID, the Fréchet distance of CLIP image embeddings (Kynkäänniemi et al., arXiv 2203.06026)."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.fid import FID

CLIP_FID = replace(FID, name="clip_fid", network="clip_fid")
