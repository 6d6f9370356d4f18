"""Bytes of a picture to pixels: Pillow, the reference, and DALI, which gives the same and can use a GPU's decoder.

Pillow's rules hold for both: RGB as Pillow converts it, EXIF orientation not applied, 16 bits cut to the upper 8. What
DALI would do otherwise (CMYK, 16 bits, palettes, other formats) is recognised by its head and left to Pillow.
"""

from __future__ import annotations

import io
import logging
import struct
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repa_scale.errors import ConfigError, DataError, require

DECODERS = ("auto", "dali", "pillow")
log = logging.getLogger("repa_scale")


def decode(data: bytes, name: str = "image") -> np.ndarray:
    """PNG or JPEG bytes -> (H, W, 3) uint8, by Pillow.

    Raises:
        DataError: it is damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            picture = rgb(image)
            # np.asarray would do the same with one copy more.
            return np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, 3)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{name} cannot be decoded ({error}); check the set with: repa-scale prepare --check") from None


def choose_decoder(wanted: str, device: torch.device) -> str:
    """`data.decoder` -> `dali` or `pillow`, and a line in the log that says why.

    Raises:
        ConfigError: unknown name.
        UserError: DALI is asked for and not installed.
    """
    if wanted not in DECODERS:
        raise ConfigError(f"data.decoder={wanted} must be one of {', '.join(DECODERS)}")
    if wanted == "dali":
        require("nvidia.dali", "dali")
    if wanted != "auto":
        return wanted
    installed = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
    if device.type == "cuda" and installed:
        log.info("data.decoder=auto: DALI, which decodes on this GPU")
        return "dali"
    reason = "DALI is not installed" if device.type == "cuda" else "without a GPU loader processes decode as fast"
    log.info("data.decoder=auto: Pillow, because %s", reason)
    return "pillow"


class DaliDecoder:
    """Decodes batches on `device`, in threads of its own.

    Args:
        batch: pictures at most in a call.
        threads: CPU threads.
    """

    def __init__(self, batch: int, threads: int, device: torch.device) -> None:
        self._words = (batch, max(1, threads), device)
        self._pipeline = None

    def __call__(self, encoded: Sequence[bytes], names: Sequence[str]) -> list[Tensor | DataError]:
        """(H, W, 3) uint8 on the device for each picture, or why there is none: one bad picture loses no other."""
        found: list[Tensor | DataError | None] = [None] * len(encoded)
        easy = [i for i, data in enumerate(encoded) if same_as_pillow(data)]
        try:
            for i, pixels in zip(easy, self._decoded([encoded[i] for i in easy]), strict=True):
                found[i] = pixels
        except RuntimeError:  # of all of them, for the sake of one; and the pipeline is of no more use
            self._pipeline = None
        device = self._words[2]
        for i, name in enumerate(names):
            if found[i] is None:
                try:
                    found[i] = torch.from_numpy(decode(encoded[i], name).copy()).to(device)
                except DataError as error:
                    found[i] = error
        return found

    def _decoded(self, encoded: list[bytes]) -> list[Tensor]:
        if not encoded:
            return []
        self._pipeline = self._pipeline or _pipeline(*self._words)
        self._pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        (pictures,) = self._pipeline.run()
        # DALI uses the memory again in its next run, so the pixels are copied out of what DLPack shows.
        return [torch.from_dlpack(pictures[i]).clone() for i in range(len(encoded))]


def _pipeline(batch: int, threads: int, device: torch.device):
    require("nvidia.dali", "dali")
    from nvidia.dali import fn, pipeline_def, types

    cuda = device.type == "cuda"

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if cuda else None,
        # One batch in, one batch out: batches.py works ahead, and an error belongs to the batch that has it.
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    def pictures():
        encoded = fn.external_source(name="encoded", device="cpu")
        return fn.decoders.image(
            encoded,
            device="mixed" if cuda else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            use_fast_idct=False,
        )

    pipeline = pictures()
    pipeline.build()
    return pipeline


def same_as_pillow(data: bytes) -> bool:
    """Whether DALI's pixels are Pillow's: a JPEG of 1 or 3 components, or a PNG of 8-bit grey or RGB."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return len(data) > 26 and data[24] == 8 and data[25] in (0, 2)
    return data[:2] == b"\xff\xd8" and _jpeg_components(data) in (1, 3)


def rgb(picture: Image.Image) -> Image.Image:
    """RGB of 8 bits as Pillow converts it: alpha dropped, palettes looked up; 16-bit grey keeps its upper 8 bits."""
    picture.load()
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((values >> (8 if values.max(initial=0) > 255 else 0)).clip(0, 255).astype(np.uint8))
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _jpeg_components(data: bytes) -> int:
    """Of the frame header; 0 where there is none of 8 bits."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        if marker in (0xC0, 0xC1, 0xC2):
            return data[at + 9] if data[at + 4] == 8 else 0
        if marker == 0xDA:
            return 0
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return 0
