"""Threads that work on a GPU: each has made it its current one, and what one hands to another is ordered by streams.

A new thread is on GPU 0. One that leaves a stream there makes CUDA start on it, in every rank of a node.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from meta_cuda import as_cuda
from meta_device import META, Watched

from repa_scale import devices
from repa_scale.data.batches import ahead
from repa_scale.data.copies import Copies
from repa_scale.data.steps import Batch
from repa_scale.serving.batcher import Batcher, Wish
from repa_scale.serving.server import Drawing


@pytest.mark.parametrize(("prepare", "touched"), [(lambda device: None, 0), (devices.use, META)])
def test_a_new_thread_is_on_gpu_0(prepare, touched):
    """What this file is about: the stand-in sees what CUDA would do to a thread that does not call `devices.use`."""
    watched = Watched({})
    with as_cuda(watched):
        copies = Copies(META)
        thread = threading.Thread(target=lambda: (prepare(META), copies.send(lambda: batch_of(0))))
        thread.start()
        thread.join()
    assert watched.contexts == {touched}


def test_feeding_threads_work_on_the_runs_gpu():
    """Those of stored features, several at a time."""
    watched = Watched({})
    with as_cuda(watched):
        copies = Copies(META)

        def read(step):
            return copies.send(lambda: batch_of(step))

        stream = map(copies.take, ahead(iter(range(100)), read, 3, copies.enter_thread))
        for step in range(1, 9):
            assert_handed_over(next(stream), step)
    assert watched.contexts == {META}


def test_the_servers_thread_draws_on_its_gpu():
    watched = Watched({})
    with as_cuda(watched):

        def pipe(labels, **_):
            with torch.cuda.stream(torch.cuda.current_stream(META)):  # leaves one, as Triton's launcher and DALI do
                return SimpleNamespace(images=[f"image of {label}" for label in labels])

        pipe.device, pipe.set_progress_bar_config = META, lambda **_: None
        batcher = Batcher(Drawing(pipe), max_batch=4, max_queue=4)
        (job,) = batcher.submit([Wish(3, 0, 2, "euler", 1.0, (0.0, 1.0))])
        assert job.image.result(10.0) == "image of 3"
        batcher.close()
    assert watched.contexts == {META}


def batch_of(step: int) -> Batch:
    numbers = torch.full((2,), step)
    return Batch(numbers, numbers, numbers, numbers, {"moments": numbers.float()})


def assert_handed_over(batch: Batch, batches: int) -> None:
    """The current stream waits for the copies of all `batches` so far, which are on another, and uses all tensors."""
    stream = torch.cuda.current_stream(META)
    assert len(stream.waited) == batches and stream not in {event.stream for event in stream.waited}
    for tensor in (batch.images, batch.labels, batch.ids, batch.index, *batch.features.values()):
        assert tensor.device == META and tensor.used_on == [stream]
