"""FD-DINOv2, the Fréchet distance of DINOv2 features (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.fid import FID

FD_DINOV2 = replace(FID, name="fd_dinov2", network="dinov2")
