"""Latent spaces: pixels exactly, and diffusers' VAEs with their posterior."""

import pytest
import torch

from repa_scale import torchvision_fix
from repa_scale.config import Config
from repa_scale.errors import ConfigError, UserError
from repa_scale.latents import build_latents
from repa_scale.sizes import latent_grid, token_grid

torchvision_fix.ensure()  # before diffusers
CPU, FP32 = torch.device("cpu"), torch.float32


def latents(name, weights="hub"):
    config = Config()
    config.latents.name, config.latents.weights = name, str(weights)
    return build_latents(config, CPU, FP32)


def test_pixels_come_back_as_they_were():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    space = latents("identity")
    x0 = space.draw(space.encode(images), torch.randn(1, 3, 16, 16))
    assert x0.min() == -1 and x0.max() == 1
    assert torch.equal(space.decode(x0), images)
    grey = latents("identity-grey")
    assert grey.encode(images).shape == (1, 1, 16, 16)
    assert torch.equal(grey.decode(grey.encode(images)), images)


def test_values_beyond_white_and_black_are_clamped():
    assert latents("identity").decode(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)).flatten().tolist() == [
        0,
        128,
        255,
    ]


def test_a_vae_gives_its_posterior(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )
    vae.save_pretrained(tmp_path / "vae")
    space = latents("sd-vae-ft-mse", tmp_path / "vae")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    moments = space.encode(images)
    with torch.no_grad():
        posterior = vae.eval().encode(images.float() / 127.5 - 1).latent_dist
    assert torch.allclose(moments, torch.cat([posterior.mean, posterior.std], 1), atol=1e-5)
    noise = torch.randn(2, 4, 4, 4)
    x0 = space.draw(moments, noise)
    assert torch.allclose(x0, (posterior.mean + posterior.std * noise) * 0.18215, atol=1e-5)
    with torch.no_grad():
        wanted = vae.decode(x0 / 0.18215).sample
    assert torch.equal(space.decode(x0), ((wanted + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))


def test_a_tiny_vae_has_no_posterior():
    pytest.importorskip("diffusers")
    space = latents("taesd", "random")
    moments = space.encode(torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8))
    assert moments.shape == (1, 4, 4, 4)
    assert torch.equal(space.draw(moments, torch.randn(1, 4, 4, 4)), moments)
    assert space.decode(moments).shape == (1, 3, 32, 32)


def test_weights_that_cannot_be_had(tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"latents\.name=sd-vae-ft-mse cannot be read") as error:
        latents("sd-vae-ft-mse", tmp_path / "empty")
    assert "\n" not in str(error.value)


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
