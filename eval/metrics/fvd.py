"""FVD, the Fréchet distance of I3D features of videos (Unterthiner et al., arXiv 1812.01717)."""

from __future__ import annotations

from dataclasses import replace

from fewstep.eval.metrics.fid import FID

FVD = replace(FID, name="fvd", network="i3d", videos=True)
