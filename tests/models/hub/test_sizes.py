"""Latent shapes: the factors are those of the VAE's config, as in the pipeline itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_pipelines import TINY

from fewstep.core.errors import UserError
from fewstep.models.hub.folder import PipelineFolder
from fewstep.models.hub.wan import Wan

pytest.importorskip("diffusers")
WAN_5B = {
    "z_dim": 48,
    "scale_factor_spatial": 16,
    "scale_factor_temporal": 4,
    "temperal_downsample": [False, True, True],
}


def test_wan_2_2_5b_has_16_pixels_per_latent() -> None:
    family = Wan({"in_channels": 48, "patch_size": [1, 2, 2]}, WAN_5B)
    assert family.default_size == (704, 1280, 121)
    assert family.shape(704, 1280, 121) == (48, 31, 44, 80)
    with pytest.raises(UserError, match="multiples of 32"):
        family.shape(720, 1280, 121)


def test_wan_2_1_has_8_pixels_per_latent() -> None:
    family = Wan({"in_channels": 16}, {"z_dim": 16})  # older configs do not have the factors
    assert family.shape(*family.default_size) == (16, 21, 60, 104)


@pytest.mark.parametrize("name", list(TINY))
def test_the_factor_of_every_family_is_the_pipelines_own(saved: Callable[[str], Path], name: str) -> None:
    folder = PipelineFolder.open(saved(name))
    pipeline = folder.pipeline()
    own = "vae_scale_factor_spatial" if name.startswith("wan") else "vae_scale_factor"
    assert folder.family.factor == getattr(pipeline, own)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_sizes_that_the_patches_of_a_transformer_do_not_fit_are_refused(
    saved: Callable[[str], Path], name: str
) -> None:
    family = PipelineFolder.open(saved(name)).family
    assert family.factor * family.network["patch_size"] == 4
    with pytest.raises(UserError, match="multiples of 4"):
        family.shape(18, 16, 1)
