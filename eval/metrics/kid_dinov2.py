"""KID in DINOv2 features, which agree better with people than Inception's (Stein et al., arXiv 2306.04675)."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.kid import KID

KID_DINOV2 = replace(KID, name="kid_dinov2", network="dinov2")
