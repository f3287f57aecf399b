"""Patch-FID: the FID of the 299 x 299 pixels at the centre of unresized images (SDXL-Lightning, arXiv 2402.13929)."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.fid import FID
from fewstep.eval.networks.inception import SIDE

PATCH_FID = replace(FID, name="patch_fid", network="inception_patch", minimum_side=SIDE)
