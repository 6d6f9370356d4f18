"""The doctor's checks on this machine: each finds the fault that is put before it, and nothing where there is none."""

import itertools
import json
import os
import resource
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import BIN

from repa_scale import cuda
from repa_scale.cli import main
from repa_scale.cuda import Facts
from repa_scale.doctor import across, fork, gpus, machine, network, reach, software
from repa_scale.doctor.finding import Finding, Look
from repa_scale.doctor.link import rounds
from repa_scale.doctor.network import Measured
from repa_scale.doctor.node import run
from repa_scale.doctor.nodes import Answer
from repa_scale.doctor.page import page
from repa_scale.doctor.table import CHECKS
from repa_scale.launch.environment import forwarded

HOPPER = Facts("2.13.0", built="13.0", driver="13.1", gpus=1, capabilities=((9, 0),), oldest=(7, 5), nccl="2.29.7")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a nvidia-smi and a dmesg on the PATH that print what real ones printed, with one thing changed."""

    def install(gpu="0, NVIDIA H100 80GB HBM3, 81559, 4, 0", apps="", links="Link 0: 26.562 GB/s", log=""):
        script = f"""#!/bin/sh
case "$*" in
*--query-gpu*) printf '%b\\n' '{gpu}';;
*--query-compute-apps*) printf '%b' '{apps}';;
*nvlink*) printf 'GPU 0: NVIDIA H100\\n\\t %b\\n' '{links}';;
esac
"""
        for name, text in (("nvidia-smi", script), ("dmesg", f"#!/bin/sh\nprintf '%b\\n' '{log}'\n")):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


def states(findings):
    return [each.state for each in findings]


def test_gpus_that_are_well(nvidia_smi):
    nvidia_smi()
    assert states([*gpus.gpus(Look(slots=1)), *gpus.nvlink(Look()), *gpus.xid(Look())]) == ["ok"] * 3


@pytest.mark.parametrize(
    ("check", "setting", "words"),
    [
        (gpus.gpus, {}, "1 GPUs, the host file says slots=8"),
        (gpus.gpus, {"gpu": "0, H100, 81559, 60000, 0", "apps": "4711, python, 59990\\n"}, "process 4711 (python)"),
        (gpus.gpus, {"gpu": "0, H100, 81559, 4, 3"}, "GPU 0: 3 uncorrected ECC errors"),
        (gpus.gpus, {"gpu": "0, H100, 81559, 4, 0\\n1, A100, 81559, 4, 0"}, "different models: A100, H100"),
        (gpus.nvlink, {"links": "Link 0: 26.562 GB/s\\n\\t Link 1: <inactive>"}, "1 of 2 links are inactive"),
        (gpus.xid, {"log": "[1.0] NVRM: Xid (PCI:0000:1b:00): 79, GPU has fallen off the bus"}, "1 Xid errors (79)"),
    ],
)
def test_a_gpu_that_is_not_well_is_named(nvidia_smi, check, setting, words):
    nvidia_smi(**setting)
    slots = 8 if "slots" in words else None
    (finding,) = check(Look(slots=slots))
    assert finding.state in ("warn", "FAIL") and words in finding.found and finding.remedy


@pytest.mark.parametrize(
    ("facts", "state", "words"),
    [
        (HOPPER, "ok", "torch for CUDA 13.0, NCCL 2.29.7, driver for CUDA 13.1, nvidia-dali-cuda130"),
        (replace(HOPPER, driver="12.4", capabilities=()), "FAIL", "the NVIDIA driver runs CUDA 12.4 at most"),
        (replace(HOPPER, capabilities=((7, 5),)), "FAIL", "GPU 0 is sm_75"),
        (replace(HOPPER, nccl=None), "FAIL", "has no NCCL"),
        (replace(HOPPER, built="12.6", oldest=(5, 0)), "FAIL", "nvidia-dali-cuda130 is not for CUDA 12.6"),
        (replace(HOPPER, driver=None, gpus=0, capabilities=()), "warn", "there is no NVIDIA driver"),
        (Facts(torch="2.13.0+cpu", driver="13.0", gpus=8), "FAIL", "8 GPUs, but torch 2.13.0+cpu is not a CUDA build"),
        (Facts(torch="2.13.0+cpu", driver="13.0"), "FAIL", "is not a CUDA build, though there is a driver"),
        (Facts(torch="2.13.0+cpu"), "note", "is not a CUDA build"),
    ],
)
def test_torch_driver_gpu_nccl_and_dali_must_fit(monkeypatch, facts, state, words):
    monkeypatch.setattr(cuda, "look", lambda: facts)
    monkeypatch.setattr(cuda, "installed_dali", lambda: ["nvidia-dali-cuda130"])
    (finding,) = software.cuda(Look())
    assert finding.state == state and words in finding.found and bool(finding.remedy) == (state in ("warn", "FAIL"))


def test_the_dali_of_this_torch_is_named_where_none_is_installed(monkeypatch):
    monkeypatch.setattr(cuda, "look", lambda: replace(HOPPER, built="12.6"))
    monkeypatch.setattr(cuda, "installed_dali", list)
    assert "no DALI ('repa-scale[dali-cuda12]')" in software.cuda(Look())[0].found


def test_a_gpu_without_bf16_does_for_a_run_in_fp16(monkeypatch):
    monkeypatch.setattr(cuda, "look", lambda: replace(HOPPER, capabilities=((7, 5),)))
    assert states(software.cuda(Look(config={"train": {"precision": "fp16"}}))) == ["ok"]


def test_packages_fit_here_and_an_unfit_one_is_named(monkeypatch):
    assert states(software.packages(Look())) == ["ok"]
    real = software.version
    monkeypatch.setattr(software, "version", lambda name: "0.8.0" if name == "timm" else real(name))
    (finding,) = software.packages(Look())
    assert finding.state == "FAIL" and "timm 0.8.0 (repa-scale asks for" in finding.found


def test_limits_of_this_process():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
        assert states(machine.limits(Look())) == ["FAIL"]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 5000), hard))
        assert states(machine.limits(Look())) == ["ok"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_disk_of_the_run(tmp_path):
    look = Look(run_dir=str(tmp_path / "not" / "yet"), checkpoint_bytes=1000)
    assert states(machine.disk(look)) == ["ok"] and list(tmp_path.iterdir()) == []
    look.kept_bytes = 1 << 60
    assert "checkpoint.keep_last" in machine.disk(look)[0].remedy
    look.checkpoint_bytes = 1 << 60
    assert states(machine.disk(look)) == ["FAIL"]
    look = Look(run_dir="/proc/run")
    assert states(machine.disk(look)) == ["FAIL"]


def test_a_port_that_is_taken():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        assert states(machine.port(Look(port=taken))) == ["FAIL"]
        assert machine.port(Look(port=taken, first=False)) == []
    assert states(machine.port(Look(port=taken))) == ["ok"]


def test_a_check_that_breaks_is_a_finding():
    finding = run("disk", lambda look: 1 / 0, Look())[0]
    assert finding.state == "FAIL" and "ZeroDivisionError" in finding.found


def test_clocks_that_disagree():
    def clock(offset, doubt):
        return across._clock(Answer("b", offset=offset, uncertainty=doubt)).state

    assert [clock(0.2, 0.001), clock(-3.0, 0.01), clock(60.0, 0.01), clock(3.0, 2.5)] == ["ok", "warn", "FAIL", "ok"]


@pytest.mark.parametrize("nodes", [2, 3, 8, 13])
def test_each_two_nodes_meet_once_and_none_is_in_two_places(nodes):
    plan = list(rounds(nodes))
    assert sorted(itertools.chain(*plan)) == list(itertools.combinations(range(nodes), 2))
    assert all(len(set(itertools.chain(*together))) == 2 * len(together) for together in plan)
    assert len(plan) <= nodes


def measured(nodes, slow):
    pairs = [[*pair, 0.05 if slow(*pair) else 2e-4, 2e6 if slow(*pair) else 2e9]
             for pair in itertools.combinations(range(nodes), 2)]  # fmt: skip
    return Measured(1e-3, 1 << 20, 1.0, pairs, [0.0] * nodes)


def test_the_slow_link_or_node_is_named():
    names = [f"n{number}" for number in range(6)]
    (link,) = network.name_slow(names, measured(6, lambda a, b: (a, b) == (2, 4)))
    assert link.node == "n2 - n4" and "50.0 ms" in link.found
    (node,) = network.name_slow(names, measured(6, lambda a, b: 3 in (a, b)))
    assert node.node == "n3" and "slow to 5 of 5 nodes" in node.found
    assert network.name_slow(names, measured(6, lambda a, b: False)) == []


@pytest.mark.distributed
def test_the_processes_of_one_node_reduce_together():
    """As the GPUs of a node do, here over gloo."""
    (found,) = network.network([""], ["here"], "127.0.0.1", 2, "gloo")
    assert found.state == "ok" and "gloo, 2 ranks" in found.found, found


@pytest.mark.long
@pytest.mark.distributed
def test_a_node_that_does_not_join_is_named(monkeypatch):
    """Two nodes here, of which the second's Python ends at once."""
    real = network.start
    monkeypatch.setattr(network, "PATIENCE", 20.0)
    monkeypatch.setattr(
        network,
        "start",
        lambda host, module, *rest, **more: real("", "no.such.module" if host else module, *rest, **more),
    )
    findings = network.network(["", "b"], ["a", "b"], "127.0.0.1", 1, "gloo")
    assert [(each.node, each.state) for each in findings] == [("b", "FAIL")]
    assert "did not reach the first node" in findings[0].found and "No module named" in findings[0].found


def test_the_table_names_nodes_and_remedies():
    nodes = ["a", "b"]
    findings = [Finding("shm", "ok", "1 GB", node="a"), Finding("shm", "FAIL", "none", "mount it", "b"),
                Finding("code", "ok", "3 files", node="a"), Finding("code", "ok", "3 files", node="b")]  # fmt: skip
    lines = page(findings, nodes).splitlines()
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["shm", "FAIL", "b"], ["->", "mount", "it"], ["shm", "ok", "a"], ["code", "ok", "all"]
    ]  # fmt: skip
    assert lines[-1] == "2 nodes: 1 in the way of a run (shm), 0 warnings"


def test_mlflow_that_does_not_answer(tmp_path):
    from dataclasses import asdict

    from repa_scale.config import Config

    config = Config()

    def state(uri):
        config.tracking.uri = uri
        return [(each.state, each.found) for each in reach.mlflow(Look(config=asdict(config)))]

    assert state("none")[0][0] == "note" and state(f"sqlite:///{tmp_path}/x.db")[0][0] == "ok"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ((found, words),) = state(f"http://127.0.0.1:{closed.getsockname()[1]}/?token=hush")
    assert found == "FAIL" and "hush" not in words


def test_alone_and_in_json(digits, tmp_path):
    """The whole verb on this machine, as a user calls it."""
    words = ["experiment=demo_repa", f"data.path={digits}", "tracking.uri=none", "run.dir=run"]
    done = subprocess.run(
        [BIN / "repa-scale", "doctor", "--json", *words], capture_output=True, text=True, cwd=tmp_path
    )
    told = json.loads(done.stdout)
    bad = [each for each in told["findings"] if each["state"] == "FAIL"]
    assert done.returncode == (70 if bad else 0), done.stderr
    assert not bad, bad
    assert {each["check"] for each in told["findings"]} >= set(CHECKS) - {"nvlink", "xid", "fork"}
    assert list(tmp_path.iterdir()) == [], "it leaves nothing behind"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--hostfil", "x"], "--hostfil is not an option"),
        (["--hostfile", "absent"], "--hostfile absent cannot be read"),
        (["--include", "a"], "give --hostfile FILE"),
        (["--fetch"], "--fetch needs the run"),
        (["train.stepz=3"], "did you mean 'train.steps'?"),
    ],
)
def test_a_mistake_is_one_line(words, line, capsys):
    assert main(["doctor", *words]) == 64
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("driver", "status", "variables", "said"),
    [
        ("mlx5_core", 0, {}, None),
        ("efa", 2, {}, "ok 1 EFA devices; the kernel copies pages on fork"),
        ("efa", 0, {"FI_EFA_FORK_SAFE": "1"}, "ok 1 EFA devices; FI_EFA_FORK_SAFE is set"),
        ("efa", 0, {"RDMAV_FORK_SAFE": "yes"}, "ok 1 EFA devices; RDMAV_FORK_SAFE is set"),
        ("efa", 0, {"FI_EFA_FORK_SAFE": "0"}, "warn 1 EFA devices; Linux"),
        ("efa", None, {}, "warn 1 EFA devices; libibverbs cannot tell"),
    ],
)
def test_a_fork_beside_efa(driver, status, variables, said, tmp_path, monkeypatch):
    (tmp_path / "drivers" / driver).mkdir(parents=True)
    (tmp_path / "class" / "rdmap0" / "device").mkdir(parents=True)
    (tmp_path / "class" / "rdmap0" / "device" / "driver").symlink_to(tmp_path / "drivers" / driver)
    monkeypatch.setattr(fork, "INFINIBAND", tmp_path / "class")
    monkeypatch.setattr(fork, "fork_status", lambda: status)
    for name in fork.ASKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = [f"{each.state} {each.found}" for each in fork.fork(Look())]
    assert [text.startswith(said or "") for text in found] == [True] * bool(said)


def test_a_list_of_gpus_that_is_too_short_is_named(nvidia_smi, monkeypatch):
    nvidia_smi()
    for value, said in (("4,5", "slot 7 is asked for"), ("0,x", "CUDA ends the list at 'x'")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        found = [each for each in gpus.gpus(Look(slots=8)) if "CUDA_VISIBLE_DEVICES" in each.found]
        assert states(found) == ["FAIL"] and said in found[0].found and found[0].remedy


def test_what_the_network_reads_reaches_the_nodes():
    """Variables of libfabric, EFA, verbs and the compilers, beside those of NCCL; and no machine's own."""
    names = (
        *("FI_PROVIDER", "FI_EFA_FORK_SAFE", "OFI_NCCL_PROTOCOL", "RDMAV_FORK_SAFE", "IBV_FORK_SAFE", "UCX_TLS"),
        *("NCCL_DEBUG", "TORCHINDUCTOR_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    )
    given = dict.fromkeys(names, "1")
    assert forwarded({**given, "CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "all", "FIGURE": "1"}) == given


def test_every_check_stands_in_the_docs():
    text = (Path(__file__).resolve().parents[1] / "docs" / "doctor.md").read_text()
    for name in [*CHECKS, "reached", "shared folder", "clock", "code", "versions", "files", "all-reduce", "link"]:
        assert f"| `{name}` |" in text, name


@pytest.mark.parametrize("answer", ["No devices were found", "", "a, b, c"])
def test_an_answer_of_nvidia_smi_that_has_no_table_is_one_line(answer, monkeypatch):
    monkeypatch.setattr(gpus.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(gpus, "_smi", lambda *_: answer)
    (found,) = gpus.gpus(SimpleNamespace(slots=None))
    assert found.state == "FAIL" and (answer or "nothing") in found.found
