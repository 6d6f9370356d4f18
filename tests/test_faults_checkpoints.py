"""Faults around checkpoints: kills at every point of a save, damage of every file, full disks, other world sizes."""

import json
import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from launching import SMALL, Launch, assert_close, end_all, exact, train

from repa_scale.checkpoint import MANIFEST, CheckpointReader, list_checkpoints
from repa_scale.cli import main
from repa_scale.run_folder import read_metrics, read_status

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    end_all()


@pytest.fixture(scope="module")
def words(digits):
    return [*SMALL, f"data.path={digits}", "train.checkpoint_every=4", "method=baseline"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    return run, train(words, run)


def faulty(words, run, *faults, **environment):
    """A start that its faults end."""
    launch = Launch(words, run, FAULTS=json.dumps(faults), **environment)
    assert launch.wait() != 0
    return launch


def tensors(folder):
    """Every number of a checkpoint."""
    reader = CheckpointReader(folder)
    reader.verify()
    return {(kind, name): reader.tensor(kind, name) for kind in reader.manifest["kinds"] for name in reader.names}


def assert_same_state(a, b):
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


KILLS = {
    "rank 1 in the middle of its shard": (["kill_in_shard", 1, 8], "step_00000004"),
    "rank 0 in the manifest": (["kill_at_file", 0, 8, MANIFEST], "step_00000004"),
    "rank 0 between rename and pointer": (["kill_at_file", 0, 8, "latest"], "step_00000008"),
}


@pytest.mark.parametrize(
    "kill", [*list(KILLS)[:1], *(pytest.param(each, marks=pytest.mark.long) for each in list(KILLS)[1:])]
)
def test_a_kill_in_a_save(words, undisturbed, tmp_path, kill):
    """The run goes on from the newest whole checkpoint, and ends in the undisturbed run's bits."""
    fault, newest = KILLS[kill]
    run = tmp_path / "run"
    faulty(words, run, fault)
    assert list_checkpoints(run / "checkpoints")[-1].name == newest
    assert read_status(run)["state"] in ("running", "failed")
    rows = train(words, run)
    assert exact(rows) == exact(undisturbed[1])
    assert_same_state(run / "checkpoints" / "step_00000012", undisturbed[0] / "checkpoints" / "step_00000012")
    assert f"resumed from {run / 'checkpoints' / newest}" in (run / "log" / "rank_0.log").read_text()
    assert not list((run / "checkpoints").glob("*.tmp-*"))
    assert main(["checkpoints", str(run), "--verify"]) == 0


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE = {"flip": _flip, "cut": lambda path: os.truncate(path, path.stat().st_size - 1), "gone": os.unlink}


def test_damage_of_any_file_is_found_and_the_older_checkpoint_taken(words, undisturbed, tmp_path, capsys):
    """Each kind of damage of each file of the newest checkpoint is found; the run resumes from the one before."""
    source = undisturbed[0] / "checkpoints"
    for name in (MANIFEST, *CheckpointReader(source / "step_00000012").manifest["files"]):
        for damage, apply in DAMAGE.items():
            run = tmp_path / f"{name}-{damage}"
            shutil.copytree(source, run / "checkpoints")
            apply(run / "checkpoints" / "step_00000012" / name)
            assert main(["checkpoints", str(run), "--verify"]) == 64, (name, damage)
            assert "BROKEN" in capsys.readouterr().out
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    _flip(run / "checkpoints" / "step_00000012" / "rank_00001_of_00002.safetensors")
    (run / "checkpoints" / "step_00000008" / MANIFEST).write_text("{}")
    for content in ("", "garbage\0", "step_99999999\n"):  # `latest` is for people and scripts; nothing depends on it
        (run / "checkpoints" / "latest").write_text(content)
    rows = train(words, run)
    assert exact(rows) == exact(undisturbed[1])
    assert [row["attempt"] for row in rows] == [1] * 4 + [2] * 8
    assert main(["checkpoints", str(run), "--verify"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("set aside") == 2 and "does not have the checksum" in listed and "is damaged" in listed
    assert (run / "checkpoints" / "latest").read_text() == "step_00000012\n"


@pytest.mark.long
def test_none_whole_is_one_clear_line_each_time(words, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed[0], run)
    for folder in list_checkpoints(run / "checkpoints"):
        _flip(folder / "rank_00000_of_00002.safetensors")
    for _ in range(2):
        launch = Launch(words, run, 1, "alone")
        assert launch.wait() == 64
        assert "is whole" in launch.text() and "Traceback" not in launch.text()
    assert len(list_checkpoints(run / "checkpoints")) == 3


@contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def wait_for_text(launch, text, after=""):
    """Until the run has printed `text`, behind `after`."""
    until = time.monotonic() + 60
    while text not in (launch.output.read_text().partition(after)[2] if after else launch.output.read_text()):
        assert launch.process.poll() is None and time.monotonic() < until, launch.text()
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize("room", ["comes back", "never"])
def test_a_full_disk_in_a_save(words, undisturbed, tmp_path, room):
    """Training goes on, the save is tried again; a run that cannot save its end says so and does not succeed."""
    with small_disk(tmp_path / "run", "64m") as run:  # what the processes print goes to another disk
        steps = ["train.steps=40"]
        if room == "comes back":  # slow steps, so that the save is tried again before the next one is due
            steps = ["train.steps=100000", "train.checkpoint_every=40"]
        launch = Launch([*words, *steps], run, FAULTS=json.dumps([["slow_rank", "all", 0.2]]))
        launch.wait_for_step(5)
        with (run / "ballast").open("wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
            while True:
                ballast.write(b"\0" * 4096)
        if room == "never":
            assert launch.wait() != 0
            # The status cannot be written either, so the disk keeps the last one that could; it is not "completed".
            assert read_status(run)["state"] in ("failed", "running")
            assert "No space left" in launch.text() and "could not be written in 4 tries" in launch.text()
            (run / "ballast").unlink()
            assert exact(train([*words, *steps], run))[:12] == exact(undisturbed[1])
        else:
            wait_for_text(launch, "could not be written")
            (run / "ballast").unlink()
            wait_for_text(launch, "trying again")
            wait_for_text(launch, "saved", after="trying again")
            (run / "stop").touch()
            launch.wait()
            assert read_status(run)["state"] == "preempted"
            rows = read_metrics(run)
            assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "rows waited for the disk"
            assert exact(rows)[:12] == exact(undisturbed[1])
        assert main(["checkpoints", str(run), "--verify"]) == 0


@pytest.mark.long
@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2), (2, 4)])
def test_other_numbers_of_ranks(words, undisturbed, tmp_path, first, second):
    """What is taken up is to the bit what was saved; ids are the same, fp32 losses within 1e-5 over 20 steps."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    words = [*words, "train.steps=24"]
    wanted = train(words, tmp_path / "wanted")
    train([*words, "train.steps=4"], run, first, "alone" if first == 1 else "torchrun")
    shutil.copytree(run / "checkpoints" / "step_00000004", kept)
    rows = Launch(
        words, run, second, "alone" if second == 1 else "torchrun", FAULTS=json.dumps([["save_again", "all", 5]])
    ).succeed()
    again = run / "checkpoints" / "step_00000004"
    assert (CheckpointReader(kept).manifest["world_size"], CheckpointReader(again).manifest["world_size"]) == (
        first,
        second,
    )
    assert_same_state(kept, again)
    assert_close(rows, wanted, 1e-5)


@pytest.mark.long
def test_retention_makes_room_and_keeps_the_only_verified_one(words, tmp_path, capsys):
    run = tmp_path / "run"
    keep = ["train.checkpoint_every=2", "checkpoint.keep_last=2", "checkpoint.keep_every=6", "checkpoint.best=loss"]
    launch = Launch([*words, *keep], run)
    names = set()
    while launch.process.poll() is None:
        names = {path.name for path in list_checkpoints(run / "checkpoints")}
        assert len(names) <= 4
    rows = launch.succeed()
    left = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert left[-2:] == ["step_00000010", "step_00000012"] and "step_00000006" in left
    mean = {s: (rows[s - 2]["loss"] + rows[s - 1]["loss"]) / 2 for s in range(2, 13, 2)}
    reader = CheckpointReader(run / "checkpoints" / "step_00000012")
    assert reader.manifest["metrics"]["loss"] == pytest.approx(mean[12], rel=1e-12)
    assert main(["checkpoints", str(run), "--prune", "--keep-last", "1"]) == 0
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000012"]
    for step in (14, 16):
        shutil.copytree(run / "checkpoints" / "step_00000012", run / "checkpoints" / f"step_000000{step}")
    _flip(run / "checkpoints" / "step_00000016" / "rank_00001_of_00002.safetensors")
    assert main(["checkpoints", str(run), "--prune", "--keep-last", "1"]) == 64, "a broken one is no newest one"
    assert [path.name[-2:] for path in list_checkpoints(run / "checkpoints")] == ["14", "16"]
    for step in (14, 16):
        (run / "checkpoints" / f"step_000000{step}").rename(run / f"aside_{step}")
    (run / "aside_14").rename(run / "checkpoints" / "step_00000012")
    _flip(run / "checkpoints" / "step_00000012" / MANIFEST)
    assert main(["checkpoints", str(run), "--prune", "--keep-last", "1"]) == 64
    assert (run / "checkpoints" / "step_00000012" / MANIFEST).exists()
