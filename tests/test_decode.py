"""Pillow and DALI give the same pixels, and the crop on the device is Pillow's to a rounding."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from repa_scale.data import crop, device_crop
from repa_scale.data.decode import DaliDecoder, choose_decoder, decode, same_as_pillow
from repa_scale.errors import ConfigError, DataError

CPU = torch.device("cpu")


def picture(width=97, height=61, mode="RGB"):
    """Smooth, with edges: like a photograph for a codec."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="JPEG", **words):
    buffer = io.BytesIO()
    image.save(buffer, kind, **words)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    return encoded(picture(), exif=exif)


KINDS = {
    "JPEG 4:2:0": encoded(picture(), quality=90),
    "JPEG 4:4:4": encoded(picture(), quality=95, subsampling=0),
    "JPEG 4:2:2": encoded(picture(), quality=90, subsampling=1),
    "JPEG progressive": encoded(picture(), progressive=True),
    "JPEG grey": encoded(picture(mode="L")),
    "JPEG CMYK": encoded(picture(mode="CMYK")),
    "JPEG turned by EXIF": rotated(),
    "PNG RGB": encoded(picture(), "PNG"),
    "PNG grey": encoded(picture(mode="L"), "PNG"),
    "PNG palette": encoded(picture(mode="P"), "PNG"),
    "PNG with alpha": encoded(picture(mode="RGBA"), "PNG"),
    "PNG 16 bits": encoded(Image.fromarray((np.arange(61 * 97).reshape(61, 97) * 11).astype(np.uint16)), "PNG"),
    "WebP": encoded(picture(), "WEBP"),
}
DIRECT = {name for name in KINDS if name.startswith("JPEG") and "CMYK" not in name} | {"PNG RGB", "PNG grey"}


@pytest.fixture(scope="module")
def dali():
    pytest.importorskip("nvidia.dali")
    return DaliDecoder(len(KINDS), 2, CPU)


def test_every_kind_has_pillows_pixels_exactly(dali):
    """The table of docs/data.md: nothing differs, and what DALI would show otherwise is left to Pillow."""
    assert {name for name, data in KINDS.items() if same_as_pillow(data)} == DIRECT
    found = dali(list(KINDS.values()), list(KINDS))
    for name, pixels in zip(KINDS, found, strict=True):
        reference = decode(KINDS[name])
        assert pixels.dtype == torch.uint8 and pixels.shape == reference.shape, name
        assert int((pixels.int() - torch.from_numpy(reference.astype(np.int32))).abs().max()) == 0, name


def test_one_bad_picture_loses_no_other(dali):
    good = KINDS["JPEG 4:2:0"]
    broken = [b"nothing at all", good[:20], b"\x89PNG\r\n\x1a\n" + bytes(30)]
    for bad in broken:
        found = dali([good, bad, good], ["a", "b", "c"])
        assert isinstance(found[1], DataError) and str(found[1]).startswith("b cannot be decoded")
        assert torch.equal(found[0], found[2]) and torch.equal(found[0], torch.from_numpy(decode(good).copy()))


def test_pixels_stay_when_the_decoder_goes_on(dali):
    first = dali([KINDS["PNG RGB"]], ["a"])[0].clone()
    kept = dali([KINDS["PNG RGB"]], ["a"])[0]
    dali([KINDS["PNG grey"]], ["b"])
    assert torch.equal(kept, first)


def test_the_choice_is_logged_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, "repa_scale"):
        assert choose_decoder("auto", CPU) == "pillow"
    assert "data.decoder=auto: Pillow, because" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.decoder=gpu must be one of"):
        choose_decoder("gpu", CPU)


@pytest.mark.parametrize("shape", [(256, 256), (300, 256), (640, 480), (1001, 777), (513, 2050), (1024, 1030)])
def test_the_crop_on_the_device_is_pillows(shape):
    image = picture(*shape)
    compare(image, 256)


def test_the_crop_on_the_device_of_photographs(data_folder):
    import zipfile

    with zipfile.ZipFile(data_folder / "imagenet_samples.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")][:20]
        for name in names:
            compare(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), 256)


def compare(image, size):
    """At most 2 of 255, in less than 1 % of the values."""
    wanted = np.asarray(crop.center_crop(image, size)).astype(int)
    found = device_crop.center_crop(torch.from_numpy(np.array(image)), size).numpy().astype(int)
    difference = np.abs(found - wanted)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01, (image.size, difference.max())
