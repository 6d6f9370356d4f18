"""Decode batches with DALI: Pillow's pixels on a CPU, nvJPEG's on a GPU (docs/data.md says how far they differ).

What DALI shows differently whatever the device (CMYK, 16 bits, palettes, other formats) is recognized by its head and
left to Pillow. Any other picture that Pillow has to decode instead is a fault: it is reported, and counted.
"""

from __future__ import annotations

import functools
import gc
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from repa_scale.cuda import dali_problem, dali_requirement, driver_cuda, installed_dali
from repa_scale.data.bad import TRIES
from repa_scale.data.decode import decode
from repa_scale.errors import DataError, require

REBUILDS = 3  # times that a decoder may lose its pipeline without a picture to blame
FAILURES = (RuntimeError, MemoryError)  # what DALI raises


class DecoderError(RuntimeError):
    """DALI does not work any more. The text is one line with the cause and the remedy."""


@dataclass(frozen=True)
class DecoderFault:
    """Something that went wrong in DALI and was dealt with.

    Attributes:
        kind: `picture`: DALI could not decode it and Pillow could; `pipeline`: it failed and was built again.
    """

    kind: str
    reason: str


class DaliDecoder:
    """Decodes batches on `device`, with its own threads.

    Args:
        batch: maximum number of pictures per call.
        threads: CPU threads.
    """

    def __init__(self, batch: int, threads: int, device: torch.device) -> None:
        self._arguments = (batch, max(1, threads), device)
        self._device = device
        self._pipeline = None
        self._faults: list[DecoderFault] = []
        self._lost = 0  # pipelines, without a picture to blame
        self._refused = 0  # pictures in a row that only Pillow could decode

    def __call__(self, encoded: Sequence[bytes], names: Sequence[str]) -> list[Tensor | DataError]:
        """(H, W, 3) uint8 on the device for each picture, or the reason why it cannot be read.

        Raises:
            DecoderError: DALI stopped working; decoding on with Pillow would train on other pixels.
        """
        found: list[Tensor | DataError | None] = [None] * len(encoded)
        ours = [i for i, data in enumerate(encoded) if left_to_dali(data)]
        decoded = self._decoded([encoded[i] for i in ours], [names[i] for i in ours])
        for i, pixels in zip(ours, decoded, strict=True):
            found[i] = pixels
        for i, name in enumerate(names):
            if found[i] is None:
                found[i] = self._by_pillow(encoded[i], name)
        return found

    def take_faults(self) -> tuple[DecoderFault, ...]:
        """What went wrong since the last call."""
        faults, self._faults = tuple(self._faults), []
        return faults

    def probe(self) -> None:
        """Decodes a tiny JPEG; raises whatever DALI raises where it cannot."""
        (pixels,) = self._run([_probe_picture()])
        if tuple(pixels.shape) != (32, 32, 3):
            raise RuntimeError(f"a JPEG of 32 x 32 pixels was decoded to the shape {tuple(pixels.shape)}")

    def _decoded(self, encoded: list[bytes], names: list[str]) -> list[Tensor | DataError]:
        try:
            found = self._run(encoded)
        except FAILURES as error:
            why = _cause(error)  # and not the error, whose frames would keep the dead pipeline's memory
        else:
            self._refused = 0 if encoded else self._refused
            return found
        return self._isolated(encoded, names, why)

    def _isolated(self, encoded: list[bytes], names: list[str], why: str) -> list[Tensor | DataError]:
        """A batch that DALI refused as a whole: one damaged picture is enough for that, and costs the pipeline too."""
        gc.collect()  # pipelines are part of reference cycles, and hold memory of the device
        found = [self._by_pillow(data, name) for data, name in zip(encoded, names, strict=True)]
        readable = [i for i, pixels in enumerate(found) if isinstance(pixels, Tensor)]
        if len(readable) < len(encoded):
            try:
                for i, pixels in zip(readable, self._run([encoded[i] for i in readable]), strict=True):
                    found[i] = pixels
                self._refused = 0 if readable else self._refused
                return found
            except FAILURES as error:
                why = _cause(error)
        refused = 0
        for i in readable:
            try:
                (found[i],) = self._run([encoded[i]])
            except FAILURES as error:
                cause = _cause(error)
            else:
                continue
            self._require_alive(cause)
            self._faults.append(DecoderFault("picture", f"{names[i]}: {cause}"))
            refused += 1
        self._refused = self._refused + refused if refused == len(readable) else 0
        if self._refused >= TRIES:
            raise DecoderError(
                f"DALI on {self._device} refuses {self._refused} pictures in a row that Pillow can read, the last one "
                f"{self._faults[-1].reason}; {REMEDY}"
            )
        if not refused:
            self._lose_pipeline(why)
        return found

    def _lose_pipeline(self, why: str) -> None:
        """Each picture alone could be decoded by a new pipeline, so none of them is to blame."""
        self._lost += 1
        self._faults.append(DecoderFault("pipeline", why))
        if self._lost > REBUILDS:
            raise DecoderError(
                f"DALI's pipeline on {self._device} failed {self._lost} times, the last time: {why}; {REMEDY}"
            )

    def _require_alive(self, why: str) -> None:
        """Raises where a new pipeline cannot even decode the probe: then it was not the picture."""
        try:
            self.probe()
        except FAILURES as error:
            raise DecoderError(
                f"DALI on {self._device} stopped decoding ({why}), and a new pipeline fails as well "
                f"({_cause(error)}); {REMEDY}"
            ) from None

    def _by_pillow(self, data: bytes, name: str) -> Tensor | DataError:
        try:
            return torch.from_numpy(decode(data, name).copy()).to(self._device)
        except DataError as error:
            return error

    def _run(self, encoded: list[bytes]) -> list[Tensor]:
        """One run of the pipeline, which is built at the first one; a failed run leaves none behind."""
        if not encoded:
            return []
        pipeline = self._pipeline or _pipeline(*self._arguments)
        self._pipeline = None  # DALI declares a pipeline invalid for good after any error
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in encoded])
        (pictures,) = pipeline.run()
        # DALI reuses the memory in its next run, so the pixels are copied, and the copies awaited.
        copies = [torch.from_dlpack(pictures[i]).clone() for i in range(len(encoded))]
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._pipeline = pipeline
        return copies


REMEDY = "start the run again, or train on with Pillow's pixels: data.decoder=pillow"


def why_not_dali(device: torch.device) -> str | None:
    """Tries DALI on `device`: None if it decodes, or the reason and the remedy in one line."""
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return f"DALI is not installed; install it with: pip install {dali_requirement(torch.version.cuda)}"
    try:
        DaliDecoder(1, 1, device).probe()
    except Exception as error:  # of a foreign library, its loader or its driver: whatever it is, it is told
        line = f"DALI cannot decode on {device} ({_cause(error)})"
        return line if device.type == "cpu" else f"{line}; {dali_problem() or _versions()}"
    finally:
        gc.collect()  # the pipeline, which is part of reference cycles, with its memory of the device
    return None


def left_to_dali(data: bytes) -> bool:
    """Whether DALI treats this kind of picture as Pillow does: JPEG of 1 or 3 components, PNG of 8-bit grey or RGB."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return len(data) > 26 and data[24] == 8 and data[25] in (0, 2)
    return data[:2] == b"\xff\xd8" and _jpeg_components(data) in (1, 3)


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
            # nvJPEG repeats subsampled chroma by default; Pillow's libjpeg-turbo interpolates it.
            jpeg_fancy_upsampling=True,
        )

    pipeline = pictures()
    pipeline.build()
    return pipeline


def _versions() -> str:
    wheels = " and ".join(installed_dali()) or "unknown"
    return (
        f"wheel {wheels}, torch for CUDA {torch.version.cuda}, driver for CUDA {driver_cuda()}; see repa-scale doctor"
    )


@functools.cache
def _probe_picture() -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _cause(error: BaseException) -> str:
    """The cause in one line: DALI puts it after a traceback of its own."""
    text = str(error).split("encountered:")[-1].replace("Current pipeline object is no longer valid.", "")
    line = " ".join(text.split()) or type(error).__name__
    return line if len(line) <= 240 else line[:240] + "..."


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
