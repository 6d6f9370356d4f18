"""The tables of sizes: grids, names that are not there, and that reading them costs no torch."""

import subprocess
import sys

import pytest

from repa_scale.errors import ConfigError
from repa_scale.sizes import (
    BACKBONES,
    ENCODERS,
    LATENTS,
    backbone,
    encoder_spec,
    latent_grid,
    latent_spec,
    token_grid,
)


def test_reading_the_tables_loads_no_torch():
    code = "import sys, repa_scale.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_every_backbone_has_whole_heads():
    for name, size in BACKBONES.items():
        assert size.width % size.heads == 0 and (size.width // size.heads) % 2 == 0, name
        assert backbone(f"{name}/2") == (size, 2)


def test_every_row_is_usable():
    for name, spec in ENCODERS.items():
        assert encoder_spec(name) is spec
        assert spec.kind in ("vit", "map") and len(spec.mean) == len(spec.std) == 3 and min(spec.std) > 0, name
        assert spec.package or "." in spec.timm_name or name.startswith("mocov3"), name  # it has weights somewhere
    for name, spec in LATENTS.items():
        assert latent_spec(name) is spec
        assert spec.kind in ("kl", "tiny", "identity") and (spec.kind == "identity" or spec.source), name
        assert {len(spec.scale), len(spec.shift)} <= {1, spec.channels} and min(spec.scale) > 0, name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encoder_spec("dinov2-vitb"), "did you mean 'dinov2-vit-b'"),
        (lambda: latent_spec("sd-vae"), "latents.name=sd-vae is not a latent space"),
        (lambda: backbone("SiT-XXL/2"), "did you mean 'SiT-XL/2'"),
        (lambda: backbone("SiT-XL/3"), "must be one of 1, 2, 4, 8"),
        (lambda: backbone("SiT-XL"), "must be one of 1, 2, 4, 8"),
    ],
)
def test_names_that_are_not_there(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_grids():
    assert latent_grid(256, "sd-vae-ft-mse") == (4, 32, 32)
    assert token_grid(256, "sd-vae-ft-mse", "SiT-XL/2") == (16, 16)
    assert token_grid(512, "sd-vae-ft-mse", "SiT-XL/2") == (32, 32)
    assert token_grid(8, "identity", "SiT-Tiny/1") == (8, 8)
    with pytest.raises(ConfigError, match="does not divide by 8"):
        latent_grid(250, "sd-vae-ft-mse")
    with pytest.raises(ConfigError, match="patches of 8 do not divide"):
        token_grid(96, "sd-vae-ft-mse", "SiT-XL/8")
    with pytest.raises(ConfigError, match="did you mean 'sd-vae-ft-mse'"):
        latent_grid(256, "sd-vae-ft-mes")
