"""The sbatch files of launchers/slurm on a real Slurm: preempted, requeued, completed."""

import json
import os
import time

import pytest
from jobs import ROOT, TINY
from launching import BIN, exact, last_step, train
from slurm import Slurm, why_not

from repa_scale.run_folder import read_metrics, read_status

pytestmark = [pytest.mark.distributed, pytest.mark.long, pytest.mark.timeout(300)]
SCRIPTS = ROOT / "launchers" / "slurm"
ONE_EACH = ("--gpus-per-node=1", "--ntasks-per-node=1")


@pytest.fixture(scope="module")
def slurm(nodes, tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with Slurm(nodes, tmp_path_factory.mktemp("slurm") / "daemons") as cluster:
        yield cluster


def submit(slurm, folder, script, *words, options=ONE_EACH):
    path = f"{BIN}:{os.environ['PATH']}"
    out = slurm.call("sbatch", "--parsable", *options, SCRIPTS / script, *words, cwd=folder, PATH=path)
    return out.strip()


@pytest.mark.parametrize("script", ["train.sbatch", "srun.sbatch"])
def test_preempted_requeued_completed(slurm, digits, tmp_path, script):
    run, steps = tmp_path / "run", 150
    words = [*TINY, f"data.path={digits}", "train.checkpoint_every=50"]
    job = submit(slurm, tmp_path, script, *words, f"train.steps={steps}", f"run.dir={run}")
    deadline = time.monotonic() + 120
    while last_step(run) < 3:
        assert time.monotonic() < deadline and slurm.state(job) in ("PENDING", "RUNNING"), log(tmp_path)
        time.sleep(0.1)
    slurm.call("scancel", "--signal=TERM", job)
    slurm.wait_for(job, "PENDING", 60)
    assert read_status(run)["state"] == "preempted"
    saved = read_status(run)["step"]
    assert 3 <= saved < steps
    slurm.wait_for(job, "COMPLETED", 150)
    status = read_status(run)
    assert (status["state"], status["step"], status["attempt"]) == ("completed", steps, 2)
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert {row["attempt"] for row in rows if row["step"] > saved} == {2}
    text = log(tmp_path)
    assert "start 1, ended with code 75" in text and "start 2, ended with code 0" in text and "resumed from" in text
    print(text)


def test_a_rank_under_srun_alone(slurm, digits, tmp_path):
    """`srun` on both nodes: the same losses as two processes of one machine."""
    words = [*TINY, f"data.path={digits}", "train.steps=3"]
    command = [BIN / "python", "-m", "repa_scale.train", *words, f"run.dir={tmp_path}/run"]
    slurm.call("srun", "--nodes=2", "--ntasks=2", *command)
    assert exact(read_metrics(tmp_path / "run")) == exact(train(words, tmp_path / "one", 2))


def test_an_array_of_runs(slurm, digits, tmp_path):
    (tmp_path / "runs.txt").write_text("seed=1 run.dir=a 'run.name=the first'\nseed=2 run.dir=b $(touch executed)\n")
    words = [*TINY, f"data.path={digits}", "train.steps=2"]
    job = submit(slurm, tmp_path, "sweep.sbatch", "runs.txt", *words, options=("--gpus-per-node=1", "--array=1-2"))
    deadline = time.monotonic() + 150
    while set(slurm.state(job).split()) & {"PENDING", "RUNNING", "COMPLETING"}:
        assert time.monotonic() < deadline, log(tmp_path)
        time.sleep(0.3)
    assert sorted(slurm.state(job).split()) == ["COMPLETED", "FAILED"], log(tmp_path)
    assert read_status(tmp_path / "a")["state"] == "completed"
    assert "the first" in (tmp_path / "a" / "config.yaml").read_text()
    assert json.loads((tmp_path / "a" / "identity.json").read_text())["keys"]["seed"] == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "b").exists()


def log(folder):
    return "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("slurm-*.log")))
