"""Which GPU each rank of a launch gets, by the CUDA_VISIBLE_DEVICES of its node."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import BIN, free_port

from repa_scale import launch
from repa_scale.errors import ConfigError
from repa_scale.launch.visible import gpus_of, visible

A, B = "GPU-5a1f0c2e-aaaa-bbbb-cccc-0123456789ab", "GPU-77"  # the second in its short form
MIG = "MIG-0f3e5c1a-aaaa-bbbb-cccc-0123456789ab"
RUN = ["experiment=demo_baseline", "model.name=SiT-Nano/2", "train.global_batch=48", "data.path=x"]


@pytest.mark.parametrize(
    ("value", "slots", "ranks"),
    [
        (None, range(8), None),
        ("", range(2), ""),
        ("-1", range(2), "-1"),
        ("-1,0", range(2), "-1,0"),
        ("4,5", range(2), "4,5"),
        ("5,4", range(2), "5,4"),
        ("4,5", [1], "5"),
        ("0,1,2", range(2), "0,1"),
        ("0,1,2", [2, 0], "2,0"),
        (" 4, 5 ", range(2), "4,5"),
        ("07", [0], "7"),
        (f"{A},{B}", range(2), f"{A},{B}"),
        (f"{A},{B}", [1], B),
        (MIG, [0], MIG),
        (f"{MIG},MIG-GPU-5a1f/1/0", [1], "MIG-GPU-5a1f/1/0"),
    ],
)
def test_slots_are_places_in_the_list(value, slots, ranks):
    assert gpus_of(slots, value) == ranks


@pytest.mark.parametrize(
    ("value", "slots", "said"),
    [
        ("7,x", [0], "CUDA ends the list at 'x'; give numbers"),
        ("7,,6", [0], "CUDA ends the list at ''; give numbers"),
        ("7,-1", [0], "CUDA ends the list at '-1'"),
        (f"0,{A}", [0], f"CUDA ends the list at '{A}'"),
        (f"{A},0", [0], "CUDA ends the list at '0'"),
        ("all", [0], "CUDA ends the list at 'all'"),
        ("0,1,0", [0], "0 stands there twice"),
        ("1,01", [0], "1 stands there twice"),
        (f"{A},{A}", [0], "twice, and CUDA then shows no GPU; name each once"),
        ("4,5", range(3), "shows 2 GPUs, and slot 2 is asked for"),
        ("4,5", [4, 5], "slots count from 0 in that list"),
        (f"{MIG},MIG-1", range(2), "a process sees one MIG instance"),
    ],
)
def test_what_cannot_be_mapped_is_refused(value, slots, said):
    with pytest.raises(ConfigError) as error:
        gpus_of(slots, value, "node-2: ")
    assert said in str(error.value) and str(error.value).startswith(f"node-2: CUDA_VISIBLE_DEVICES={value}")


def test_what_torch_says_of_the_same_forms(monkeypatch):
    """Where both take a list they show the same."""
    from torch.cuda import _parse_visible_devices

    for value in ("4,5", "5,4", "0,1,2", "4, 5", f"{A},{B}", MIG, "", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert [str(each) for each in _parse_visible_devices()] == visible(value)


def planned(monkeypatch, value, *options):
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    args, words = launch._parser().parse_known_args([*options, *RUN])
    plan = launch.make_plan(args, words)
    assert "CUDA_VISIBLE_DEVICES" not in plan.variables
    return [len(host.slots) for host in plan.hosts], plan.visible, launch.describe(plan)


NO_SSH = ("--no_ssh", "--num_nodes", "2", "--num_gpus", "2", "--node_rank", "1", "--master_addr", "a")


def test_a_plan_counts_and_maps(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for value, options, counts, gpus in (
        ("5,4,3", (), [3], "GPUs 5,4,3"),
        ("0,1,2", ("--num_gpus", "2"), [2], "GPUs 0,1"),
        ("4,5", NO_SSH, [2, 2], "GPUs 4,5"),
        (f"{A},{B}", NO_SSH, [2, 2], f"GPUs {A},{B}"),
        ("", ("--num_gpus", "3"), [3], "no GPU"),
        ("-1", ("--num_gpus", "3"), [3], "no GPU"),
    ):
        assert planned(monkeypatch, value, *options)[:2] == (counts, value)
        assert f"slots {','.join(map(str, range(counts[0])))} ({gpus})" in planned(monkeypatch, value, *options)[2]
    for options in (("--num_gpus", "3"), (*NO_SSH[:4], "3", *NO_SSH[5:])):
        with pytest.raises(ConfigError, match="shows 2 GPUs, and slot"):
            planned(monkeypatch, "4,5", *options)


def test_over_ssh_the_list_of_this_machine_does_not_count(monkeypatch, tmp_path):
    """That of `.deepspeed_env` does, on each node."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "hosts").write_text("rs-a slots=4\nrs-b slots=2\n")
    assert planned(monkeypatch, "9,x", "--hostfile", "hosts")[1] is None
    (tmp_path / ".deepspeed_env").write_text("CUDA_VISIBLE_DEVICES=4,5,6,7\n")
    counts, value, text = planned(monkeypatch, None, "--hostfile", "hosts")
    assert (counts, value) == ([4, 2], "4,5,6,7") and "(GPUs 4,5,6,7)" in text and "(GPUs 4,5)" in text
    (tmp_path / ".deepspeed_env").write_text("CUDA_VISIBLE_DEVICES=4,5\n")
    with pytest.raises(ConfigError, match="slot 3 is asked for"):
        planned(monkeypatch, None, "--hostfile", "hosts")


# In the place of the training: which GPU torch would take for this rank (ranks.pick_device: that of its local rank).
RANK = """
import json, os, sys, types
if "repa_scale.launch.entry" in sys.orig_argv:
    def main(argv):
        gpu = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[int(os.environ["LOCAL_RANK"])]
        facts = {"gpu": gpu, **{name: os.environ[name] for name in ("WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK")}}
        with open(os.path.join(os.environ["FOLDER"], os.environ["RANK"]), "x") as file:
            json.dump(facts, file)
        return 0
    sys.modules["repa_scale.train"] = types.SimpleNamespace(main=main)
"""


@pytest.mark.distributed
def test_sixteen_ranks_on_two_nodes_get_a_gpu_each(tmp_path):
    """The real launcher, deepspeed and guards; numbers in another order on one node, UUIDs on the other."""
    (tmp_path / "sitecustomize.py").write_text(RANK)
    lists = ["7,6,5,4,3,2,1,0", ",".join(f"GPU-{k}a" for k in range(8))]
    port = free_port()
    starts = [
        subprocess.Popen(
            [BIN / "repa-scale", "launch", "--no_ssh", "--num_nodes", "2", "--num_gpus", "8", "--node_rank", str(node),
             "--master_addr", "127.0.0.1", "--master_port", str(port), *RUN, f"run.dir={tmp_path / 'run'}"],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": value, "FOLDER": str(tmp_path), "DS_ACCELERATOR": "cuda",
                 "PYTHONPATH": f"{tmp_path}:{Path(launch.__file__).parents[2]}"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )
        for node, value in enumerate(lists)
    ]  # fmt: skip
    for start in starts:
        text, _ = start.communicate(timeout=120)
        assert start.returncode == 0, text
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(16)]
    assert [rank["gpu"] for rank in ranks] == [*lists[0].split(","), *lists[1].split(",")]
    assert [(r["WORLD_SIZE"], r["LOCAL_SIZE"], r["CROSS_RANK"]) for r in ranks] == [
        ("16", "8", str(rank // 8)) for rank in range(16)
    ]


def test_the_command_refuses_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "repa_scale", "launch", "--num_gpus", "2", *RUN],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "7,x"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 64 and len(done.stderr.splitlines()) == 1 and "'x'" in done.stderr, done.stderr
