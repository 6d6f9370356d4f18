"""How ranks meet, and how one that fails ends: a verdict before the process group, the outcome before anything else."""

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launching import free_port
from process_group import group_of_one

from repa_scale import cuda, host_group, ranks, roll_call, timeouts
from repa_scale.engine import _import_deepspeed, check_accelerator
from repa_scale.errors import LOST, ConfigError, MachineError, UserError
from repa_scale.ranks import Ranks
from repa_scale.roll_call import Report, judge

WORLD = 16  # two nodes of eight
EIGHT = [Report(f"gpu-{1 + rank // 8}", "cuda", 8) for rank in range(WORLD)]
BROKEN = "local rank 5 has no GPU: this machine shows 5"


def changed(ranks_: range | list[int], **facts: object) -> dict[int, Report]:
    return {rank: replace(EIGHT[rank], **facts) if rank in ranks_ else EIGHT[rank] for rank in range(WORLD)}


@pytest.fixture(scope="module")
def connections():
    """One per rank to a real store, made one after the other: of a burst a busy kernel makes some wait for seconds."""
    lead = dist.TCPStore("127.0.0.1", 0, WORLD, True, wait_for_workers=False)
    return [lead, *(dist.TCPStore("127.0.0.1", lead.port, WORLD, False, wait_for_workers=False) for _ in EIGHT[1:])]


@pytest.fixture
def meet(connections, monkeypatch):
    """meet(reports, patience) returns what each rank says of the others."""
    monkeypatch.setattr(timeouts, "TELL", 0.5)
    monkeypatch.setattr(roll_call, "MORE_SECONDS", 0.2)
    corner = uuid.uuid4().hex

    def all_ranks(reports: dict[int, Report], patience: float = 30.0) -> set[str]:
        def one(rank: int) -> str:
            try:
                store = dist.PrefixStore(corner, connections[rank])
                roll_call.join(store, rank, WORLD, reports[rank], patience)
            except (ConfigError, RuntimeError) as error:
                return f"{type(error).__name__}: {error}"
            return ""

        with ThreadPoolExecutor(WORLD) as pool:
            return set(pool.map(one, reports))

    return all_ranks


def test_sixteen_ranks_that_fit_join(meet):
    assert meet(changed([])) == {""}
    assert judge(changed(range(8, 16), gpus=4), WORLD, 1.0).problem == "", "nodes may differ"


def test_a_rank_on_the_cpu_is_refused_on_all(meet):
    said = meet(changed([9, 11], device="cpu", gpus=0))
    assert len(said) == 1
    line = said.pop()
    assert line.startswith("ConfigError: all ranks need one kind of device, but they have cuda on ranks 0-7 on gpu-1")
    assert "ranks 8, 10, 12-15 on gpu-2; cpu on ranks 9, 11 on gpu-2; run repa-scale doctor" in line
    assert "\n" not in line and "train.device=cpu" in line


def test_ranks_of_one_node_that_see_other_gpus_are_refused_on_all(meet):
    said = meet(changed([3], gpus=7))
    assert len(said) == 1 and "on gpu-1 torch shows 7 by rank 3, 8 by ranks 0-2, 4-7; give them" in said.pop()


@pytest.mark.parametrize(("user", "kind"), [(True, "ConfigError"), (False, "RuntimeError")])
def test_an_error_of_one_rank_ends_all_with_its_line(meet, user, kind):
    """At once, although three others have not come."""
    reports = changed([13], device="", gpus=0, error=BROKEN, user=user)
    for late in (7, 8, 9):
        del reports[late]
    began = time.monotonic()
    assert meet(reports) == {f"{kind}: rank 13 on gpu-2: {BROKEN}"} and time.monotonic() - began < 5


def test_ranks_that_do_not_come_are_named(meet):
    reports = {rank: report for rank, report in changed([]).items() if rank < 8}
    said = meet(reports, patience=0.3)
    assert len(said) == 1 and said.pop().startswith("RuntimeError: ranks 8-15 of 16 did not come in 0 s; look for")


def test_who_prints_its_own_error():
    """Each error once per node, and none that rank 0 prints anyway."""
    old = {rank: replace(EIGHT[rank], error="old driver") for rank in range(WORLD)}
    assert judge(old, WORLD, 1.0).speakers == ()
    assert judge({**old, 0: EIGHT[0]}, WORLD, 1.0).speakers == (1, 8)
    assert judge({**old, 5: replace(EIGHT[5], error=BROKEN)}, WORLD, 1.0).speakers == (5,)
    assert "(and 15 more ranks cannot join)" in judge(old, WORLD, 1.0).problem


# Real processes: rank 1 cannot have its device, or fails while rank 0 waits for it; who leaves the group, blocks.
FAILS = """
import sys, threading, time
import torch, torch.distributed as dist
from repa_scale import cli, roll_call, train
from repa_scale.errors import ConfigError
from repa_scale.processes import end_process
from repa_scale.ranks import Ranks

dist.destroy_process_group = lambda *_: threading.Event().wait()
where = sys.argv[1]

def run(config, origin):
    ranks = Ranks.from_environment("cpu")
    with ranks.telling():
        if where == "before" and ranks.rank == 1:
            raise ConfigError("local rank 1 has no GPU")
    ranks.start(1.0)
    if ranks.rank == 0:
        time.sleep(1.2)  # rank 0 restores a checkpoint for longer than a collective may take
    assert ranks.broadcast_object(ranks.rank) == 0 and ranks.gather_objects(ranks.rank) == [0, 1]
    if ranks.rank == 1:
        raise RuntimeError("laid by the test")
    ranks.barrier()

train.run = run
words = ["experiment=demo_repa"]
end_process(cli.main(["train", *words]) if int(sys.argv[2]) else train.main(words))
"""


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["after", pytest.param("before", marks=pytest.mark.long)])
def test_a_rank_that_fails_leaves_its_outcome_and_ends(tmp_path, where):
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment |= {"REPA_SCALE_OUTCOMES": str(tmp_path), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS, where, str(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=30)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    left = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert codes == [each["code"] for each in left] == ([64, 64] if where == "before" else [70, 70]), said
    if where == "before":
        host = platform.node()
        assert said[0].strip() == f"repa-scale: error: rank 1 on {host}: local rank 1 has no GPU"
        assert said[1].strip() == f"repa-scale: error on {host} rank 1: local rank 1 has no GPU"
    else:
        assert left[1]["error"] == "RuntimeError: laid by the test"
        assert left[0]["error"].startswith(LOST), left[0]


@pytest.mark.parametrize("world", [1, 2])
def test_other_commands_leave_the_group_only_where_nobody_is_waited_for(monkeypatch, world):
    left = []
    monkeypatch.setattr(Ranks, "start", lambda self, **_: None)
    monkeypatch.setattr(ranks, "leave_group", lambda: left.append("left"))
    alone = Ranks(0, 0, world, torch.device("cpu"))
    with pytest.raises(ValueError), alone.joined():
        raise ValueError
    assert left == ["left"] * (world == 1)
    with alone.joined():
        pass
    assert len(left) == 1 + (world == 1)


@pytest.mark.parametrize("world", [1, 2])
def test_nccl_is_bound_to_its_device_and_objects_travel_over_gloo(monkeypatch, world):
    asked = {}
    host = SimpleNamespace(bound_device_id=torch.device("cuda", 1))
    monkeypatch.setattr(cuda, "look", lambda: cuda.Facts("2.13.0"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(Ranks, "_meet", lambda self: dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **words: asked.update(words, backend=backend))
    monkeypatch.setattr(dist, "new_group", lambda **words: asked.update(host=words) or host)
    monkeypatch.setattr(host_group, "set_timeout", lambda timeout, group=None: asked.update(host_timeout=timeout))
    monkeypatch.setattr(host_group, "_group", None)
    monkeypatch.setattr(ranks, "_SET_BY_US", {})
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    Ranks(world - 1, world - 1, world, torch.device("cuda", world - 1)).start(5000.0)
    assert asked["backend"] == "nccl" and asked["timeout"] == timedelta(seconds=5000)
    if world == 1:
        assert asked["device_id"] is None and "host" not in asked, "DeepSpeed leaves it out too: no one to reach"
    else:
        assert asked["device_id"] == torch.device("cuda", 1)
        assert asked["host"]["backend"] == "gloo" and asked["host_timeout"] > timedelta(days=1)
        assert host_group._group is host and host.bound_device_id is None, "else a barrier is a tensor on the GPU"


def test_gloo_takes_the_interface_that_nccl_was_told():
    name = socket.if_nameindex()[0][1]
    for told, taken in {f"={name}": name, name: name, "ib9": None, "^docker0": None}.items():
        environment = {"NCCL_SOCKET_IFNAME": told}
        host_group.choose_interface(environment)
        assert environment.get("GLOO_SOCKET_IFNAME") == taken, told
    environment = {"NCCL_SOCKET_IFNAME": name, "GLOO_SOCKET_IFNAME": "own"}
    host_group.choose_interface(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "own"


def test_hosts_that_cannot_connect_are_one_line():
    with (
        pytest.raises(UserError, match=r"over gloo \(connect timeout\); set GLOO_SOCKET_IFNAME"),
        host_group.connecting(),
    ):
        raise RuntimeError("connect timeout")


def test_groups_of_deepspeed_have_the_timeout_of_the_run():
    with group_of_one() as alone:
        _import_deepspeed(alone)
        from deepspeed.utils import groups

        clone = groups._clone_world_group()
        options = clone._get_backend(torch.device("cpu")).options
        assert options._timeout == alone.timeout == timedelta(seconds=timeouts.collectives())


ACCELERATOR = """
import sys, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 8
from repa_scale.engine import check_accelerator, import_deepspeed
from repa_scale.errors import ConfigError
import_deepspeed(sys.argv[1])
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name())
try:
    check_accelerator("cuda")
except ConfigError as error:
    print(error)
"""


def test_deepspeed_takes_the_ranks_device_on_a_machine_with_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(
        [sys.executable, "-c", ACCELERATOR, "cpu"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    name, refusal = done.stdout.splitlines()[-2:]
    assert name == "cpu" and refusal.startswith("train.device=cuda, but DeepSpeed has taken cpu in this process")


def test_another_accelerator_than_the_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_accelerator("cpu")
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu, but the ranks work on cuda; unset DS_ACCELERATOR, or"):
        check_accelerator("cuda")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            cuda.Facts("2.13.0+cpu", driver="13.0", gpus=8),
            "this machine has 8 GPUs, but torch 2.13.0+cpu is not a CUDA",
        ),
        (cuda.Facts("2.13.0+cpu", gpus=1), "this machine has 1 GPU, but torch 2.13.0+cpu is not a CUDA build; install"),
        (cuda.Facts("2.13.0", built="13.0", gpus=8), "this machine has 8 GPUs, but no NVIDIA driver can be loaded"),
    ],
)
def test_auto_does_not_pass_over_a_gpu(monkeypatch, facts, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "look", lambda: facts)
    with pytest.raises(MachineError, match=f"device auto: {re.escape(words)}.*; or set the device to cpu") as refused:
        ranks.pick_device("auto")
    assert "\n" not in str(refused.value)
    assert ranks.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(cuda, "look", lambda: replace(facts, hidden=True))
    assert ranks.pick_device("auto") == torch.device("cpu"), "hidden on purpose"
