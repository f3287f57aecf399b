"""The Fréchet distance of EfficientNet-Lite0 features: for natural images offline; no published number uses it."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.fid import FID

FD_EFFICIENTNET = replace(FID, name="fd_efficientnet", network="efficientnet")
