"""Which rank a process is: by each launcher's variables, and by real processes under torchrun, deepspeed and mpirun."""

import json
import shutil
import subprocess
import sys

import pytest
from launching import SMALL, Launch, exact, train

from repa_scale.errors import ConfigError
from repa_scale.placement import Placement, adopt, find, first_node

SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[003-005]",
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
}
MPI = {f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "1", "LOCAL_RANK": "1", "SIZE": "2", "LOCAL_SIZE": "2"}.items()}
TORCH = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "5", "LOCAL_SIZE": "2"}


def test_each_launchers_variables():
    assert find({}) == Placement(0, 0, 1, 1, None, "alone")
    assert find(TORCH) == Placement(1, 1, 4, 2, ("a", 5), "torch")
    found = find(SLURM)
    assert (found.rank, found.local_rank, found.world_size, found.local_size) == (3, 1, 5, 2)
    assert found.master[0] == "gpu003" and found.master == find({**SLURM, "SLURM_PROCID": "0"}).master
    assert found.master[1] != find({**SLURM, "SLURM_JOB_ID": "78"}).master[1], "two jobs meet at two ports"
    assert find({**SLURM, **MPI}).launcher == "mpirun" and find({**SLURM, **MPI, **TORCH}).launcher == "torch"
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_NTASKS": "5"}
    assert find(batch).launcher == "alone", "a batch script is no task"
    environment = dict(MPI)
    adopt(environment)
    assert find(environment) == Placement(1, 1, 2, 2, find(MPI).master, "torch")


def test_node_lists():
    for nodes, first in {
        "a": "a",
        "a,b": "a",
        "gpu-[07-12,20]": "gpu-07",
        "gpu[1,3],other[1-2]": "gpu1",
        "n[01-02]-ib,x": "n01-ib",
    }.items():
        assert first_node(nodes) == first
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        first_node("r[1-2]n[1-4]")


def test_incomplete_variables():
    with pytest.raises(ConfigError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"):
        find({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match="RANK=4 is not below WORLD_SIZE=4"):
        find({**TORCH, "RANK": "4"})
    with pytest.raises(ConfigError, match="mpirun -x MASTER_ADDR"):
        find({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize("launcher", ["mpirun", "deepspeed", "alone"])
def test_a_run_under_each_launcher(digits, tmp_path, launcher):
    """The same losses as under torchrun. (srun: tests/two_nodes/test_slurm.py.)"""
    words = [*SMALL, "method=baseline", f"data.path={digits}", "train.steps=3"]
    processes = 1 if launcher == "alone" else 2
    if launcher == "mpirun":
        if shutil.which("mpirun") is None:
            pytest.skip("mpirun is absent: apt-get install openmpi-bin")
        command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", "-x", "OMP_NUM_THREADS=1"]
        command += ["-x", "DS_ACCELERATOR=cpu", sys.executable, "-m", "repa_scale.train", *words]
        done = subprocess.run([*command, f"run.dir={tmp_path}/run"], capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    else:
        rows = train(words, tmp_path / "run", processes, launcher)
    expected = train(words, tmp_path / "torchrun", processes)
    assert exact(rows) == exact(expected)


@pytest.mark.distributed
@pytest.mark.long
def test_torchrun_restarts_after_a_death(digits, tmp_path):
    """Its elastic restart: a rank kills itself once, all ranks are started again and go on from the checkpoint."""
    (tmp_path / "once").mkdir()
    words = [*SMALL, "method=baseline", f"data.path={digits}", "train.steps=6", "train.checkpoint_every=2"]
    faults = {"FAULTS": '[["kill", 1, 4]]', "FAULTS_ONCE": f"{tmp_path}/once"}
    started = Launch(words, tmp_path / "run", restarts=2, **faults)
    rows = started.succeed()
    assert exact(rows) == exact(train(words, tmp_path / "whole", 2))
    assert {row["attempt"] for row in rows} == {1, 2}
