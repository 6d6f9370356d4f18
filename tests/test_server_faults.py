"""What a server does when the GPU fails or its memory does not suffice: answers, health, exit code, what is let go."""

import gc
import json
import socket
import threading
import time
import weakref

import numpy as np
import pytest
import torch
import uvicorn
from serving import Server, export, serving, tiny_source

from repa_scale.cli import main as cli
from repa_scale.serving.app import Service, create_app
from repa_scale.serving.asked import Defaults, Limits
from repa_scale.serving.batcher import Batcher, Closing, Wish
from repa_scale.serving.faults import NotDrawn, device_lost, out_of_memory
from repa_scale.serving.labels import LabelNames
from repa_scale.serving.server import Drawing

AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)  # from torch 2.8 on
ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
FULL = "CUDA out of memory. Tried to allocate 12.00 GiB. GPU 0 has a total capacity of 79.10 GiB"
ERRORS = {
    "assert": (AcceleratorError(ASSERT), "lost"),
    "assert, torch 2.6": (RuntimeError(ASSERT), "lost"),
    "illegal address": (AcceleratorError("CUDA error: an illegal memory access was encountered"), "lost"),
    "ECC": (AcceleratorError("CUDA error: uncorrectable ECC error encountered"), "lost"),
    "cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"), "lost"),
    "cuDNN": (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "lost"),
    "Triton": (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), "lost"),
    "memory": (torch.OutOfMemoryError(FULL), "memory"),
    "memory, outside the allocator": (AcceleratorError("CUDA error: out of memory"), "memory"),
    "memory, cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "memory"),
    "memory, CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "memory",
    ),
    "of ours": (RuntimeError("2 images were drawn for 3"), "neither"),
    "another kind": (ValueError("CUDA error: no"), "neither"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_kinds_of_errors(name):
    error, kind = ERRORS[name]
    assert (device_lost(error), out_of_memory(error)) == (kind == "lost", kind == "memory")


def wish(seed, steps=1):
    return Wish(0, seed, steps, "euler", 1.0, (0.0, 1.0))


@pytest.mark.parametrize("name", ["memory", "assert", "of ours"])
def test_a_failed_batch_holds_no_activations(name, caplog):
    """Neither the answer, nor the waiting thread, nor a log handler that keeps its records (pytest's does)."""
    held = []

    def network():
        activations = torch.zeros(1000)
        held.append(weakref.ref(activations))
        try:
            raise KeyError("an error behind the error")
        except KeyError as error:
            raise ERRORS[name][0] from error

    def draw(wishes, wanted):
        images = torch.zeros(1000)
        held.append(weakref.ref(images))
        network()

    gc.disable()  # what only a collection frees stays until one comes
    try:
        batcher = Batcher(draw, max_batch=2, max_queue=4, linger=0)
        (job,) = batcher.submit([wish(0)])
        failed = job.image.exception(timeout=5)
        assert isinstance(failed, NotDrawn) and "network" in caplog.text and "KeyError" in caplog.text
        until = time.monotonic() + 5
        while any(each() is not None for each in held) and time.monotonic() < until:
            time.sleep(0.01)
        assert len(held) == 2 and [each() for each in held] == [None, None]
    finally:
        gc.enable()
    batcher.close(5)


def test_after_a_lost_gpu_everyone_is_answered_and_nothing_more_is_taken():
    go, lost, drawn = threading.Event(), threading.Event(), []

    def draw(wishes, wanted):
        go.wait(5)
        drawn.extend(wish.seed for wish in wishes)
        raise ERRORS["assert"][0]

    batcher = Batcher(draw, max_batch=2, max_queue=8, linger=0, on_lost=lost.set)
    jobs = batcher.submit([wish(i, steps=1 + i // 2) for i in range(6)])
    assert batcher.alive
    go.set()
    failed = [job.image.exception(timeout=5) for job in jobs]
    assert all(each.status == 503 and each.lost for each in failed)
    assert lost.wait(5) and not batcher.alive and batcher.waiting == 0
    assert drawn == [0, 1], "a batch was drawn on a GPU that had failed"
    with pytest.raises(Closing):
        batcher.submit([wish(0)])
    batcher.close(5)


def test_a_gpu_that_cannot_even_free_its_memory_is_lost_and_its_batch_answered(monkeypatch):
    def refuse():
        raise ERRORS["assert"][0]

    def draw(wishes, wanted):
        raise ERRORS["memory"][0]

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    lost = threading.Event()
    batcher = Batcher(draw, max_batch=2, max_queue=8, linger=0, on_lost=lost.set)
    failed = [job.image.exception(timeout=5) for job in batcher.submit([wish(0), wish(1)])]
    assert all(each.status == 503 and each.lost for each in failed) and lost.wait(5)
    batcher.close(5)


def test_a_drawing_thread_that_dies_leaves_nobody_waiting():
    def observe(jobs, seconds):
        raise OSError("no counters")

    lost = threading.Event()
    batcher = Batcher(lambda wishes, wanted: np.zeros((1, 1, 1, 3)), 1, 8, 0, observe, lost.set)
    jobs = batcher.submit([wish(0), wish(1)])
    assert jobs[0].image.result(timeout=5).shape == (1, 1, 3)
    assert jobs[1].image.exception(timeout=5).status == 503 and lost.wait(5) and not batcher.alive


@pytest.fixture
def served():
    """A server in a thread whose drawing raises what `served.errors` holds, in turn; `served.lost`: it was told to
    end."""
    errors, lost = [], threading.Event()

    def draw(wishes, wanted):
        if errors:
            raise errors.pop(0)
        return np.zeros((len(wishes), 8, 8, 3), np.uint8)

    labels = LabelNames.of(10, None)
    service = Service(draw, labels, Defaults(4, 1.0, (0.0, 1.0), "euler"), Limits(), linger=0)
    app = create_app(service, lost.set)
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        made = Server(None, listening.getsockname()[1])
        made.errors, made.lost = errors, lost
        yield made
        running.should_exit = True
        thread.join(10)


def test_memory_that_does_not_suffice_is_503_and_the_next_image_is_drawn(served, monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    served.errors.append(ERRORS["memory"][0])
    status, headers, body = served.ask("POST", "/v1/images", {"class": 1, "n": 3, "format": "json"})
    assert status == 503 and headers["retry-after"] == "1" and emptied == [True]
    assert json.loads(body)["error"].startswith("memory does not suffice to draw 3 images at a time")
    assert b"GiB" not in body and served.ask()[0] == 200
    assert served.images({"class": 1})[0] == 200 and not served.lost.is_set()


def test_a_lost_gpu_is_503_everywhere_and_ends_the_server(served):
    assert served.ask()[0] == 200
    served.errors.append(ERRORS["assert"][0])
    status, answer = served.images({"class": 1})
    assert status == 503 and "the GPU has failed" in answer["error"]
    assert served.lost.wait(5)
    status, _, body = served.ask()
    assert status == 503 and "the GPU has failed" in json.loads(body)["status"]
    assert served.images({"class": 1})[0] == 503


def test_another_error_is_500_and_does_not_end_the_server(served):
    served.errors.append(ERRORS["of ours"][0])
    status, answer = served.images({"class": 1})
    assert status == 500 and "RuntimeError" in answer["error"]
    assert served.ask()[0] == 200 and not served.lost.is_set()


# As a real process.

FAILS = """
import sys, torch
from repa_scale.serving import server
draw = server.Drawing.__call__
def failing(self, wishes, wanted=lambda: True):
    images = draw(self, wishes, wanted)
    if wishes[0].seed == 666:
        raise RuntimeError("CUDA error: device-side assert triggered")
    return images
server.Drawing.__call__ = failing
from repa_scale.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(tiny_source(), tmp_path_factory.mktemp("served") / "diffusers")


def test_a_lost_gpu_ends_the_process_with_code_70_after_its_answers(folder):
    with serving(folder, "--max-batch", 1, program=["-c", FAILS]) as server:
        status, answer = server.images(
            {"class": 1, "seed": 665, "n": 3}
        )  # one is drawn, one fails, one waits behind it
        assert status == 503 and "the GPU has failed" in answer["error"]
        assert server.process.wait(30) == 70
        heard = server.heard()
    assert "device-side assert triggered" in heard and heard.rstrip().splitlines()[-1] == (
        "repa-scale: error: the GPU has failed; the log above says how. Start the server again"
    )


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("memory", "--device cpu: the device's memory does not suffice (CUDA out of"),
        ("assert", "the GPU does not work"),
    ],
)
def test_an_error_of_the_first_draw_is_one_line(folder, capsys, monkeypatch, name, line):
    def warm(self):
        raise ERRORS[name][0]

    monkeypatch.setattr(Drawing, "warm", warm)
    assert cli(["serve", str(folder), "--port", "0", "--device", "cpu"]) == 64
    said = capsys.readouterr().err
    assert line in said and len(said.splitlines()) == 1
