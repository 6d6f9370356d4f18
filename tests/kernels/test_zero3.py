"""The fused projector under ZeRO-3 on two ranks: per-rank gradients and memory, against plain torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import free_port

WORKER = Path(__file__).parent / "zero3_worker.py"
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("zero3"), str(free_port())
    started = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",  # every large tensor has pages of its own, and gives them back
        }  # fmt: skip
        command = [sys.executable, WORKER, folder / f"{rank}.pt"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        for process in started:
            output = process.communicate(timeout=150)[0].decode()
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_every_rank_has_the_gradients_of_plain_torch(ranks):
    for rank in ranks:
        assert 0.49 < rank["triton"]["share"] < 0.51, "the weights are not cut up"
        assert abs(rank["triton"]["loss"] - rank["torch"]["loss"]) < 1e-6
        for ours, plain in zip(rank["triton"]["gradients"], rank["torch"]["gradients"], strict=True):
            assert plain.abs().max() > 0 and (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert ranks[0]["triton"]["loss"] != ranks[1]["triton"]["loss"], "the ranks saw different data"


def test_nothing_gathered_stays_for_the_backward_pass(ranks):
    """Between the passes: less than a quarter of the gathered weights; at the peak: no more than plain torch."""
    for rank in ranks:
        print({kernel: (rank[kernel]["alive"], rank[kernel]["peak"]) for kernel in ("torch", "triton")})
        assert rank["triton"]["alive"] < 0.25 * rank["weights"]
        assert rank["triton"]["peak"] < 1.1 * rank["torch"]["peak"]
