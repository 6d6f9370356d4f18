"""`repa-scale launch` on two nodes, with real sshd, pdsh and deepspeed, ZeRO-3 over gloo; and when things break."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import BYSTANDER, ROOT, TINY, Started
from launching import BIN, exact, last_step

from repa_scale.compose import compose
from repa_scale.run_folder import read_status

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
STEPS = 6
FOR_EVER = ("train.steps=1000000", "checkpoint.keep_last=2")
CANARIES = {
    "MLFLOW_TRACKING_PASSWORD": "canary-tracking-7f3a",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+9c1e",
    "HF_TOKEN": "hf_canary5d2b",
}
IN_FILE = "canary in a file $(touch BAD) `touch BAD`"
ODD = ["a b", "[x] {y}", "'single' \"double\"", "$HOME $(touch BAD) `touch BAD`; touch BAD & #", "%n %h \\ *"]


@pytest.fixture(scope="module")
def data(digits):
    return f"data.path={digits}"


@pytest.fixture(scope="module")
def whole(nodes, data, tmp_path_factory):
    """A run with everything that could go wrong on the way to the nodes: odd words, secrets, comments in the files, and
    a working folder whose files node B does not have."""
    folder = tmp_path_factory.mktemp("whole")
    bad = folder / "executed"
    (folder / "hosts").write_text("# the nodes\n\nrs-a slots=2  # one is used\n   \nrs-b slots=1\n")
    (folder / "base.yaml").write_text("optimizer:\n  learning_rate: 0.002\n")
    probe = f"PROBE_FOLDER={folder}\nPROBE_NAMES={','.join(CANARIES)},FROM_FILE,BLANKS\n"
    odd = IN_FILE.replace("BAD", str(bad))
    (folder / ".deepspeed_env").write_text(
        f"# variables\n\n{probe}FROM_FILE='{odd}'\nexport BLANKS=\"a  b\"\nBLANKS = c  d\n"
    )
    for name in ("base.yaml", ".deepspeed_env"):
        nodes.run(nodes.a, "cp", folder / name, nodes.private / name)
    names = [word.replace("BAD", str(bad)) for word in ODD]
    started = Started(
        nodes,
        folder / "run",
        [
            data,
            f"train.steps={STEPS}",
            f"run.name='{names[0]}'",
            f"tracking.uri=sqlite:///{folder}/mlflow.db",
            f"tracking.experiment={json.dumps(' '.join(names))}",
        ],
        ["--hostfile", str(folder / "hosts"), "--num_gpus", "1"],
        nodes.private,
        PYTHONPATH=str(ROOT / "tests" / "two_nodes" / "probe"),
        **CANARIES,
    )
    seen = []
    while started.process.poll() is None:
        seen += (
            nodes.run(nodes.a, "ps", "axww").stdout.splitlines() + nodes.run(nodes.b, "ps", "axww").stdout.splitlines()
        )
        # With their environments: those that last; a compiler that torch starts for a moment inherits all of a rank's.
        lines = nodes.run(nodes.b, "ps", "axeww").stdout.splitlines()
        seen += [line for line in lines if "repa_scale.launch" in line or "sshd" in line]
        time.sleep(0.7)
    rows = started.succeed()
    return started, rows, seen, names, bad


@pytest.mark.long
def test_1_the_losses_are_those_of_one_node(nodes, whole, data, tmp_path):
    """The one node is B, chosen from a host file on A: deepspeed would take one node alone for the machine it is on."""
    _, rows, *_ = whole
    (tmp_path / "hosts").write_text("rs-a slots=2\nrs-b slots=2\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--include", "rs-b"]
    one = Started(nodes, tmp_path / "one", [data, f"train.steps={STEPS}"], options)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert exact(rows) == exact(one.succeed())
    assert "[rs-b 0]" in one.text() and "[rs-a" not in one.text()


@pytest.mark.long
def test_8_secrets_reach_the_ranks_and_nothing_else(whole):
    started, _, seen, _, bad = whole
    wanted = {**CANARIES, "FROM_FILE": IN_FILE.replace("BAD", str(bad)), "BLANKS": "c  d"}
    reached = [json.loads(path.read_text()) for path in started.run.parent.glob("reached-rs-*.json")]
    hashes = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in wanted.items()}
    assert sum(each == hashes for each in reached) == 2, "both ranks have every one of them"
    assert any("repa_scale.launch.entry" in text for text in seen) and any(
        "launch.py" in t or "launcher" in t for t in seen
    )
    canaries = [value.encode() for value in CANARIES.values()] + [IN_FILE.replace("BAD", str(bad)).encode()]
    for value in canaries:
        assert not [line for line in seen if value.decode() in line], "ps shows it"
        files = [path for path in started.run.parent.rglob("*") if path.is_file() and path.name != ".deepspeed_env"]
        assert started.output in files and any(path.name == "mlflow.db" for path in files)
        assert not [path for path in files if value in path.read_bytes()]
    for node in (started.nodes.a, started.nodes.b):
        assert "repa-scale" not in started.nodes.run(node, "ls", "/dev/shm").stdout, "nothing of the job is left"


@pytest.mark.long
def test_10_words_arrive_unchanged(whole):
    started, _, _, names, bad = whole
    config = compose(["--config", str(started.run / "config.yaml")])
    assert config.run.name == names[0] and config.tracking.experiment == " ".join(names)
    assert not bad.exists(), "something in a word was executed"


@pytest.mark.long
def test_7_a_private_working_folder_is_enough_for_the_configuration(whole):
    """It was started in a folder of which node B has an empty one of its own."""
    started, *_ = whole
    assert started.nodes.run(started.nodes.b, "ls", "-A", started.nodes.private).stdout == ""
    assert read_status(started.run)["state"] == "completed"


@pytest.mark.long
def test_7_no_shared_folder(nodes, data, tmp_path):
    started = Started(nodes, nodes.private / "run", [data, "train.steps=2"], cwd=tmp_path)
    assert started.wait() == 64
    assert "is not the same folder on all nodes: rs-b does not see" in started.text()
    assert "must lie on a file system that all nodes share" in started.text()
    assert nodes.run(nodes.a, "ls", nodes.private / "run").returncode != 0, "what was made for it is gone again"
    started.wait_until_nothing_is_left(5.0)


def test_6_other_code_on_a_node_is_refused(nodes, tmp_path):
    shutil.copytree(ROOT / "repa_scale", tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "trainer.py").open("a") as file:
        file.write("\nSOMETHING = 1\n")
    nodes.run(nodes.b, "mount", "--bind", tmp_path / "other", ROOT / "repa_scale")
    try:
        started = Started(nodes, tmp_path / "run", ["data.path=data", "train.steps=2"])
        assert started.wait() == 64
    finally:
        nodes.run(nodes.b, "umount", ROOT / "repa_scale")
    assert "rs-b has other code of repa_scale than this machine: repa_scale/trainer.py" in started.text()
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_2_sigterm_saves_on_all_nodes(nodes, data, tmp_path):
    started = Started(nodes, tmp_path / "run", [data, *FOR_EVER])
    started.wait_for_step(2)
    os.kill(started.process_of(nodes.a, "bin/repa-scale launch"), signal.SIGTERM)
    assert started.wait() == 75, started.text()
    started.wait_until_nothing_is_left(2.0)
    status = read_status(started.run)
    assert status["state"] == "preempted"
    (saved,) = (started.run / "checkpoints").glob("step_*")
    assert saved.name == f"step_{status['step']:08d}" and len(list(saved.glob("rank_*"))) == 2


@pytest.fixture(scope="module")
def bystander(nodes, tmp_path_factory):
    """Another job of the same user on node B, under deepspeed itself."""
    folder = tmp_path_factory.mktemp("bystander")
    (folder / BYSTANDER).write_text("import time\nopen('up', 'w').close()\ntime.sleep(600)\n")
    process = nodes.start(nodes.b, [BIN / "deepspeed", "--num_gpus", 1, BYSTANDER], folder)
    until = time.monotonic() + 60
    while not (folder / "up").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.1)
    before = nodes.processes(BYSTANDER)["rs-b"]
    assert len(before) == 3, "deepspeed, launch.py and the script"
    yield before
    for pid in before:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "part", "said"),
    [
        ("a", "bin/deepspeed", "deepspeed was killed by SIGKILL"),
        (
            "b",
            "deepspeed.launcher.launch --world_info",
            "rank 1 on rs-b was ended, because launch.py on its node is gone",
        ),
        ("b", "repa_scale.launch.entry", "rank 1 on rs-b was killed by SIGKILL"),
        ("a", "bin/repa-scale launch", ""),
    ],
    ids=["deepspeed", "launch.py", "rank", "launcher"],
)
def test_3_a_death_ends_the_job(nodes, data, tmp_path, bystander, where, part, said):
    started = Started(nodes, tmp_path / "run", [data, *FOR_EVER])
    started.wait_for_step(2)
    victims = nodes.processes(part)[getattr(nodes, where).name].keys() - bystander.keys()
    (victim,) = [pid for pid in victims if "repa" in Path(f"/proc/{pid}/cmdline").read_text()]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    code = started.wait(10.0)
    started.wait_until_nothing_is_left(10.0 - (time.monotonic() - began))
    assert time.monotonic() - began < 10.0
    assert code == 70 or (code == -signal.SIGKILL and not said)
    assert said in started.text(), started.text()
    assert nodes.processes(BYSTANDER)["rs-b"] == bystander, "another job of the same user was touched"


@pytest.mark.long
def test_4_a_parted_network(nodes, data, tmp_path):
    started = Started(
        nodes,
        tmp_path / "run",
        [data, *FOR_EVER, "train.checkpoint_every=2"],
        ["--hostfile", str(nodes.hostfile), "--lost_after", "6"],
    )
    started.wait_for_step(4)
    nodes.part()
    began = time.monotonic()
    try:
        assert started.wait(20.0) == 70
        started.wait_until_nothing_is_left(20.0 - (time.monotonic() - began))
    finally:
        nodes.rejoin()
    assert "rs-b is lost: nothing was heard of it for 6 s" in started.text()
    done = last_step(started.run)
    again = Started(nodes, tmp_path / "run", [data, f"train.steps={done + 2}"])
    assert again.succeed()[-1]["step"] == done + 2
    assert "resumed from" in again.text()


@pytest.mark.long
def test_5_a_slow_and_lossy_link(nodes, whole, data, tmp_path):
    _, expected, *_ = whole
    nodes.slow_link(delay_ms=50.0, loss=0.01)
    try:
        rows = Started(nodes, tmp_path / "run", [data, "train.steps=2"]).succeed()
    finally:
        nodes.fast_link()
    assert exact(rows) == exact(expected[:2])
    assert rows[-1]["step_seconds"] > 0.2, "the link was slow"


def test_a_node_that_cannot_be_reached(nodes, tmp_path):
    """It is named, with what ssh says; nothing is started, and it is no wrong input: `supervise` tries again."""
    nodes.part()
    try:
        nodes.run(nodes.a, "ip", "route", "add", "unreachable", "10.231.0.2")  # so that ssh need not wait
        started = Started(nodes, tmp_path / "run", ["data.path=data", "train.steps=2"])
        assert started.wait() == 70
    finally:
        nodes.run(nodes.a, "ip", "route", "del", "unreachable", "10.231.0.2")
        nodes.rejoin()
    assert "rs-b cannot be used (ssh: connect to host rs-b port 22" in started.text()
    assert not (tmp_path / "run").exists()
    started.wait_until_nothing_is_left(2.0)


def test_9_wrong_host_files_and_variables(tmp_path):
    """Each is refused in one line that names the file and the line; nothing in it is executed."""
    bad = tmp_path / "executed"

    def refused(hosts, variables="", *options):
        (tmp_path / "hosts").write_text(hosts)
        (tmp_path / ".deepspeed_env").write_text(variables)
        done = subprocess.run(
            [BIN / "repa-scale", "launch", "--hostfile", "hosts", *options, "--dry-run", *TINY, "train.global_batch=8"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert not bad.exists()
        lines = done.stderr.splitlines()
        assert done.returncode == 64 and len(lines) == 1, (done.stdout, done.stderr)
        return lines[0]

    good = "rs-a slots=1\n"
    assert "hosts line 3: 'rs-a slots=2': rs-a stands already in line 1" in refused(f"{good}\nrs-a slots=2\n")
    assert "hosts line 1: 'rs-a slots=0': a node without slots" in refused("rs-a slots=0\n")
    assert "hosts line 2: 'rs-b' is not of the form" in refused(f"{good}rs-b\n")
    assert "'-oProxyCommand=x' is not a host name" in refused("-oProxyCommand=x slots=1\n")
    assert "is not a host name" in refused(f"$(touch${{IFS}}{bad}) slots=1\n")
    assert "names no node" in refused("# nothing\n\n")
    assert "did you mean 'rs-a'" in refused(good, "", "--include", "rs-aa")
    assert "rs-a has the slots 0 to 0" in refused(good, "", "--include", "rs-a:1")
    assert "leaves no node" in refused(good, "", "--exclude", "rs-a")
    assert "--hostfil is not an option of repa-scale launch; did you mean '--hostfile'" in refused(
        good, "", "--hostfil=x"
    )
    assert "the host file has 1 nodes" in refused(good, "", "--num_nodes", "2")
    assert ".deepspeed_env line 2: the value of A holds $" in refused(good, f"\nA=$(touch {bad})\n")
    assert ".deepspeed_env line 1 is not of the form NAME=VALUE" in refused(good, f"touch {bad}\n")
    assert 'begins with " and does not end' in refused(good, 'A="x\n')
