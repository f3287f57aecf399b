"""sFID, the spatial FID (Nash et al., arXiv 2103.03841), as ADM's evaluator computes it (arXiv 2105.05233)."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.fid import FID

SFID = replace(FID, name="sfid", network="inception_spatial")
