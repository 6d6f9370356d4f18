"""Latent spaces: pixels exactly, and diffusers' VAEs with their posterior."""

import pytest
import torch

from benchmarks.counted_memory import Counter
from repa_scale import torchvision_fix
from repa_scale.config import Config
from repa_scale.errors import UserError
from repa_scale.latents import build_latents, in_parts

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


def small_vae(folder, channels=4, blocks=4):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        norm_num_groups=4,
        latent_channels=channels,
    )
    vae.save_pretrained(folder)
    return vae


def test_a_vae_gives_its_posterior(tmp_path):
    vae = small_vae(tmp_path / "vae")
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
    difference = space.decode(x0).int() - ((wanted + 1) * 127.5).round().clamp(0, 255).int()
    assert difference.abs().max() <= 1 and difference.count_nonzero() < 5, (
        "a value that lies on the edge may fall either way"
    )


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


def test_a_vae_of_another_kind_or_shape_is_refused(tmp_path):
    """Diffusers itself takes each of these with a warning at most."""
    small_vae(tmp_path / "vae")
    with pytest.raises(UserError, match=r"holds a AutoencoderKL, but latents\.name=taesd"):
        latents("taesd", tmp_path / "vae")
    small_vae(tmp_path / "wide", channels=16)
    with pytest.raises(UserError, match="makes 16 channels at 1/8"):
        latents("sd-vae-ft-mse", tmp_path / "wide")
    small_vae(tmp_path / "shallow", blocks=3)
    with pytest.raises(UserError, match="makes 4 channels at 1/4"):
        latents("sd-vae-ft-mse", tmp_path / "shallow")


def test_damaged_weights_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    small_vae(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("decoder.conv_in.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors of its VAE, such as decoder\.conv_in\.bias"):
        latents("sd-vae-ft-mse", tmp_path / "vae")
    save_file({**tensors, "decoder.conv_in.bias": bias[:3]}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"decoder\.conv_in\.bias") as error:
        latents("sd-vae-ft-mse", tmp_path / "vae")
    assert "\n" not in str(error.value)


def test_the_attention_of_published_vaes_is_found_under_its_old_names(tmp_path):
    """sd-vae-ft-mse was published before diffusers renamed it."""
    from safetensors.torch import load_file, save_file

    small_vae(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    want = load_file(file)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    have = {}
    for name, value in want.items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        have[name] = value
    assert "encoder.mid_block.attentions.0.query.weight" in have
    save_file(have, file, metadata={"format": "pt"})
    vae = latents("sd-vae-ft-mse", tmp_path / "vae").vae
    assert all(torch.equal(value, want[name]) for name, value in vae.state_dict().items())


def test_random_weights_are_the_same_everywhere():
    pytest.importorskip("diffusers")
    torch.manual_seed(1)
    first = latents("taesd", "random").vae.state_dict()
    torch.manual_seed(2)  # another rank's generator stands elsewhere
    second = latents("taesd", "random").vae.state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class Seen:
    """A VAE's method that notes how many images each call sees."""

    def __init__(self, method):
        self.method, self.counts = method, []

    def __call__(self, x):
        self.counts.append(len(x))
        return self.method(x)


@pytest.mark.parametrize(("size", "decoded", "encoded"), [(256, [16] * 4, [32] * 2), (512, [4] * 16, [8] * 8)])
def test_a_grid_of_64_images_takes_3_gb_whatever_their_size(size, decoded, encoded):
    """Counted on meta: 12.9 GB at 256 px and 51.5 GB at 512 in one call."""
    pytest.importorskip("diffusers")
    space = latents("sd-vae-ft-mse", "random")
    space.vae.to("meta")
    space.scale, space.shift = space.scale.to("meta"), space.shift.to("meta")
    space.vae.decode, space.vae.encode = Seen(space.vae.decode), Seen(space.vae.encode)
    rows = torch.empty(64, 4, size // 8, size // 8, device="meta")
    images = torch.empty(64, 3, size, size, dtype=torch.uint8, device="meta")
    cases = (space.decode, rows, images.shape, 3.5e9), (space.encode, images, (64, 8, *rows.shape[2:]), 5.6e9)
    for function, given, shape, most in cases:
        counter = Counter()
        counter.known(given, *space.vae.parameters(), *space.vae.buffers())
        with counter:
            out = function(given)
        assert out.shape == shape and counter.most < most + out.nbytes
    assert space.vae.decode.counts == decoded and space.vae.encode.counts == encoded


def test_an_image_has_the_same_bits_in_every_part(monkeypatch):
    """Parts are equal in size: of a part of one image, mkldnn's convolutions give other bits."""
    pytest.importorskip("diffusers")
    space = latents("taesd", "random")
    x0 = torch.randn(7, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    whole, moments = space.decode(x0), space.encode(images)
    monkeypatch.setattr("repa_scale.latents.DECODED_PIXELS", 3 * 32**2)
    monkeypatch.setattr("repa_scale.latents.ENCODED_PIXELS", 3 * 32**2)
    decode, encode = space.vae.decode, space.vae.encode
    space.vae.decode, space.vae.encode = Seen(decode), Seen(encode)
    assert torch.equal(space.decode(x0), whole) and torch.equal(space.encode(images), moments)
    assert space.vae.decode.counts == space.vae.encode.counts == [3, 3, 3]
    space.decode(x0, at_a_time=7)
    assert space.vae.decode.counts == [3, 3, 3, 7]


def test_rows_come_back_in_order_from_parts():
    for count, most, sizes in ((5, 0, [1] * 5), (5, 2, [2] * 3), (6, 4, [3, 3]), (4, 9, [4]), (0, 3, [0])):
        seen = Seen(lambda x: x + 1)
        assert torch.equal(in_parts(seen, torch.arange(count)[:, None], most), torch.arange(count)[:, None] + 1)
        assert seen.counts == sizes
