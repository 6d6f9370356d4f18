"""`repa-scale doctor` on two real nodes: healthy, with faults that it must name, and on a link that is slow."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import BIN

from repa_scale.doctor.finding import Finding
from repa_scale.doctor.page import page

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(400)]


def doctor(nodes, *words, code, **environment):
    """Findings by (check, node) of those that are not ok; the table goes to the test's output."""
    command = [BIN / "repa-scale", "doctor", "--hostfile", nodes.hostfile, *words]
    done = nodes.run(nodes.a, *command, "--json", cwd=nodes.folder, **environment)
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    findings = [Finding(**each) for each in told["findings"]]
    print(f"\n{page(findings, told['nodes'])}")
    assert done.returncode == code, page(findings, told["nodes"])
    assert all(each.remedy for each in findings if each.state in ("FAIL", "warn"))
    return {(each.check, each.node): each for each in findings if each.state in ("FAIL", "warn")}


@pytest.fixture
def run(nodes, digits):
    """The keys of a run on a shared folder."""
    data = nodes.folder / "digits"
    if not data.exists():
        shutil.copytree(digits, data)
    return ["experiment=demo_repa", f"data.path={data}", f"run.dir={nodes.folder}/runs/x", "tracking.uri=none"]


def test_healthy_nodes_are_healthy(nodes, run):
    assert doctor(nodes, *run, code=0) == {}
    shown = nodes.run(
        nodes.a, BIN / "repa-scale", "doctor", "--hostfile", nodes.hostfile, "--no-network", cwd=nodes.folder
    )
    assert shown.returncode == 0 and "nothing is in the way of a run" in shown.stdout, shown.stdout + shown.stderr


@contextmanager
def mounted(nodes, node, *words):
    """A mount inside one node."""
    done = nodes.run(node, "mount", *words)
    assert done.returncode == 0, done.stderr
    try:
        yield
    finally:
        nodes.run(node, "umount", words[-1])


def test_each_fault_is_named(nodes, run, tmp_path):
    """Eight at once, on one node or the other: each has its row, its node and its remedy."""
    other_code = tmp_path / "interpolant.py"
    other_code.write_text((ROOT / "repa_scale" / "interpolant.py").read_text() + "\nCHANGED = True\n")
    run = [*run, f"run.dir={nodes.private}/runs/x", "tracking.uri=http://rs-a:5999"]
    data = next(word for word in run if word.startswith("data.path=")).removeprefix("data.path=")
    limit = ["prlimit", "--pid", str(nodes.b.init)]
    shown = subprocess.run([*limit, "--nofile", "--output", "SOFT", "--noheadings"], capture_output=True, text=True)
    before = shown.stdout.strip()
    listen = "import socket, time; s = socket.socket(); s.bind(('', 5888)); s.listen(); time.sleep(99)"
    busy = nodes.start(nodes.a, ["python3", "-c", listen])
    try:
        subprocess.run([*limit, "--nofile=1024:"], check=True)
        with (
            mounted(nodes, nodes.b, "--bind", other_code, ROOT / "repa_scale" / "interpolant.py"),
            mounted(nodes, nodes.b, "-t", "tmpfs", "-o", "size=16m", "tmpfs", "/dev/shm"),
            mounted(nodes, nodes.b, "-t", "tmpfs", "tmpfs", data),
            mounted(nodes, nodes.b, "-t", "tmpfs", "-o", "size=20m", "tmpfs", nodes.private),
        ):
            bad = doctor(nodes, "--master_port", "5888", *run, code=70)
    finally:
        busy.kill()
        subprocess.run([*limit, f"--nofile={before}:"], check=True)
    assert set(bad) == {
        ("code", "rs-b"), ("shm", "rs-b"), ("limits", "rs-b"), ("data", "rs-b"), ("disk", "rs-b"),
        ("shared folder", "rs-b"), ("mlflow", "rs-a"), ("port", "rs-a"),
    }  # fmt: skip
    assert "repa_scale/interpolant.py" in bad["code", "rs-b"].found
    assert "ulimit -n 1024" in bad["limits", "rs-b"].found
    assert "5888" in bad["port", "rs-a"].found and "rs-a:5999" in bad["mlflow", "rs-a"].found


def test_other_versions_and_a_wrong_interface_are_named(nodes, run, tmp_path):
    """B has another timm, by what its installation says of itself; both are told an interface that they do not have."""
    import importlib.metadata

    metadata = Path(str(importlib.metadata.distribution("timm")._path)) / "METADATA"
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace("\nVersion: 1.0.31", "\nVersion: 0.9.0"))
    with mounted(nodes, nodes.b, "--bind", other, metadata):
        bad = doctor(nodes, *run, "--no-network", code=70, GLOO_SOCKET_IFNAME="ib9")
    assert set(bad) == {("versions", "rs-b"), ("packages", "rs-b"), ("name", "rs-a"), ("name", "rs-b")}
    assert "timm (0.9.0 there, 1.0.31 here)" in bad["versions", "rs-b"].found
    assert "timm 0.9.0 (repa-scale asks for" in bad["packages", "rs-b"].found


def test_a_slow_link_is_named_with_its_figures(nodes, run):
    nodes.slow_link(delay_ms=50.0, loss=0.01)
    try:
        bad = doctor(nodes, *run, code=70)
    finally:
        nodes.fast_link()
    assert set(bad) == {("all-reduce", ""), ("link", "rs-a - rs-b")}
    found = bad["link", "rs-a - rs-b"].found
    milliseconds = float(found.split("slow: ")[1].split(" ms")[0])
    assert 90 < milliseconds < 600, found


def test_a_node_that_is_away_is_named_and_the_others_are_looked_at(nodes, run):
    nodes.part()
    try:
        bad = doctor(nodes, *run, code=70)
    finally:
        nodes.rejoin()
    assert set(bad) == {("reached", "rs-b")}
    assert "ssh rs-b true" in bad["reached", "rs-b"].remedy


def test_a_check_that_hangs_is_named(nodes, run):
    """Its sshd lives, and opening a file of the set does not come back, as on a dead network file system."""
    fifo = nodes.folder / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    with mounted(nodes, nodes.b, "--bind", fifo, Path(run[1].removeprefix("data.path=")) / "dataset.json"):
        bad = doctor(nodes, *run, "--no-network", "--patience", "25", code=70)
    assert set(bad) == {("data", "rs-b")} and "no answer in 25 s" in bad["data", "rs-b"].found


def test_weights_are_fetched_once_a_node_and_checked(nodes, run):
    """A hub in node A, and a cache of its own on each node; then a byte is flipped on B."""
    from diffusers import AutoencoderTiny

    store, notes, cache = nodes.folder / "hub", nodes.folder / "notes", nodes.private / "hf"
    AutoencoderTiny().save_pretrained(store / "madebyollin" / "taesd")
    server = nodes.start(nodes.a, [sys.executable, ROOT / "tests" / "hub_server.py", store, "5777", notes])
    home = {"HF_HOME": str(cache), "HF_ENDPOINT": "http://10.231.0.1:5777"}
    words = ["method=baseline", "latents.name=taesd", "model.name=SiT-S/2", "checkpoint.keep_last=1", *run[2:]]
    try:
        bad = doctor(nodes, "--no-network", *words, code=0, **home)
        assert {key[0] for key in bad} == {"weights"} and "doctor --fetch" in bad["weights", "rs-b"].remedy
        assert doctor(nodes, "--fetch", *words, code=0, **home) == {}
        asked = notes.read_text().split("\n")[:-1]
        for address in ("10.231.0.1", "10.231.0.2"):
            assert sum(line.startswith(f"{address} GET") for line in asked) == 2, "two files, once a node"
    finally:
        server.kill()
    build = "from repa_scale.compose import compose; from repa_scale.latents import build_latents; "
    build += "build_latents(compose(['latents.name=taesd']), 'cpu', __import__('torch').float32)"
    for node in (nodes.a, nodes.b):
        done = nodes.run(node, sys.executable, "-c", build, HF_HUB_OFFLINE="1", **home)
        assert done.returncode == 0, done.stderr
    blob = f"$(readlink -f {cache}/hub/models--madebyollin--taesd/snapshots/*/diffusion_pytorch_model.safetensors)"
    nodes.run(nodes.b, "bash", "-c", f"printf x | dd of={blob} bs=1 seek=5000 conv=notrunc")
    bad = doctor(nodes, "--no-network", *words, code=70, **home)
    assert set(bad) == {("weights", "rs-b")} and "is damaged" in bad["weights", "rs-b"].found
    bad = doctor(nodes, "--fetch", *words, code=70, HF_HUB_OFFLINE="1", **home)
    assert set(bad) == {("weights", "rs-b")} and "HF_HUB_OFFLINE=1 forbids" in bad["weights", "rs-b"].found
