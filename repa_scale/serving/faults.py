"""What an error while drawing means: a batch too large for the memory, a GPU that has failed, or neither."""

from __future__ import annotations

import logging
import traceback

import torch

from repa_scale.errors import reason

MEMORY_SIGNS = ("out of memory", "allocate memory", "ALLOC_FAILED")  # of CUDA, the CPU's allocator, cuBLAS and cuDNN
DEVICE_SIGNS = ("CUDA error", "CUDA driver error", "Triton Error [CUDA]", "cuDNN error", "HIP error")
LOST = "the GPU has failed; the server is ending, ask another one"

log = logging.getLogger(__name__)


class NotDrawn(Exception):
    """Why an image was not drawn, without the error's traceback, whose frames hold the batch's activations.

    Attributes:
        status: of the HTTP answer.
        lost: whether the device is gone, and nothing can be drawn any more.
    """

    def __init__(self, why: str, status: int = 500, lost: bool = False) -> None:
        super().__init__(why)
        self.status, self.lost = status, lost


def out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice, of the GPU or the host: a smaller batch may still be drawn."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in MEMORY_SIGNS))


def device_lost(error: BaseException) -> bool:
    """Whether CUDA refused: after an assert on the device, an illegal address or an ECC error, each later call of this
    process fails as well. torch has a class for it from 2.8 on; before, and in its libraries, only the text tells."""
    if not isinstance(error, RuntimeError) or out_of_memory(error):
        return False
    known = isinstance(error, getattr(torch, "AcceleratorError", ()))
    return known or any(sign in str(error) for sign in DEVICE_SIGNS)


def let_go(error: BaseException, images: int) -> NotDrawn:
    """Logs an error of drawing `images` images, frees the tensors of its frames, and says what clients are told."""
    # As text: a handler that keeps its records would keep the frames.
    log.error("a batch of %d images failed\n%s", images, "".join(traceback.format_exception(error)).rstrip())
    each: BaseException | None = error
    while each is not None:
        traceback.clear_frames(each.__traceback__)
        each = each.__cause__ or each.__context__
    if device_lost(error):
        return NotDrawn(LOST, 503, lost=True)
    if out_of_memory(error):
        try:
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # fragments: the next batch may need other sizes
        except RuntimeError as failed:  # the batch failed for more than its memory, and still has to be answered
            log.error("the GPU's memory cannot be freed: %s", reason(failed))
            return NotDrawn(LOST, 503, lost=True)
        what = f"{images} images" if images > 1 else "the image"
        return NotDrawn(f"memory does not suffice to draw {what} at a time; ask for fewer images, or try again", 503)
    return NotDrawn(f"drawing failed ({type(error).__name__}); the server's log says why")


def at_start(error: BaseException) -> str:
    """One line for an error of loading a model or its first draw; empty: it is another kind of error."""
    if out_of_memory(error):
        return (
            f"the device's memory does not suffice ({reason(error)}); end other programs that use it, or choose "
            "--dtype bf16 or a smaller --max-batch"
        )
    return f"the GPU does not work ({reason(error)}); run repa-scale doctor" if device_lost(error) else ""
