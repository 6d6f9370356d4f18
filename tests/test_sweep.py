"""`repa-scale train -m`: which runs a sweep has, in which folders, and how it ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from launching import SMALL, last_step

from repa_scale.errors import ConfigError
from repa_scale.run_folder import read_status
from repa_scale.sweep import expand, main, name_of

HEAD = ["experiment=demo_repa", "data.path=nowhere"]


def sweep(words, folder, **environment):
    command = [sys.executable, "-m", "repa_scale", "train", "-m", *words]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **environment},
    )  # fmt: skip


def test_every_combination_is_a_run_in_a_folder_of_its_own():
    variants, left_out = expand([*HEAD, "seed=0,1,2", "alignment.repa.weight=0.25,0.5"])
    assert left_out == [] and len(variants) == 6
    assert [v.config.seed for v in variants] == [0, 0, 1, 1, 2, 2]
    assert [v.config.alignment["repa"].weight for v in variants] == [0.25, 0.5] * 3
    assert variants[1].folder == "runs/demo_repa-sweep/seed-0_weight-0.5" == variants[1].config.run.dir
    assert variants[1].words[-1] == "run.dir=runs/demo_repa-sweep/seed-0_weight-0.5"
    assert len({v.folder for v in variants}) == 6


def test_folders_by_a_template():
    (first, *_), _ = expand([*HEAD, "seed=3,4", "method=repa,baseline", "run.dir=out/{method}/s{seed}"])
    assert first.folder == "out/repa/s3"
    (first, *_), _ = expand([*HEAD, "seed=3,4", "run.dir=out"])
    assert first.folder == "out/seed-3"


def test_commas_inside_brackets_and_quotes_part_nothing():
    variants, _ = expand([*HEAD, "optimizer.betas=[0.9,0.95],[0.9,0.99]", 'health.leave_out="12-15,40"'])
    assert [v.config.optimizer.betas for v in variants] == [[0.9, 0.95], [0.9, 0.99]]
    assert {v.config.health.leave_out for v in variants} == {"12-15,40"}
    assert [v.folder.rsplit("/")[-1] for v in variants] == ["betas-0.9-0.95", "betas-0.9-0.99"]


def test_a_baseline_is_not_run_again_for_each_weight():
    words = [*HEAD, "method=repa,baseline", "alignment.repa.weight=0.25,0.5", "seed=0,1"]
    variants, left_out = expand(words)
    assert [v.config.method for v in variants].count("baseline") == 2 and len(variants) == 6
    assert len(left_out) == 2 and "the same run as runs/demo_repa-sweep/repa" not in left_out[0]
    # What does not change the identity is swept all the same: someone measures its speed.
    assert len(expand([*HEAD, "train.micro_batch=8,16"])[0]) == 2
    both = [*HEAD, "method=baseline", "alignment.repa.weight=0.25,0.5", "train.micro_batch=8,16"]
    assert [dict(v.chosen)["train.micro_batch"] for v in expand(both)[0]] == ["8", "16"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["seed=0"], "needs a key with several values"),
        (["seed=0,"], "one of its values is empty"),
        (["seed=0,0"], "names a value twice"),
        (["seed=0,1", "seed=2,3"], "given twice"),
        (["seed=0,x"], "seed"),
        (["sead=0,1"], "did you mean"),
        (["seed=0,1", "method=repa,baseline", "run.dir=out/{seed}"], "is the folder of 2 runs"),
        (["seed=0,1", "run.dir=out/{method}"], "method is not swept"),
        (["seed=" + ",".join(map(str, range(1001)))], "has 1001 runs"),
    ],
)
def test_sweeps_that_cannot_be(words, said):
    with pytest.raises(ConfigError, match=said) as caught:
        expand([*HEAD, *words])
    assert "\n" not in str(caught.value)


def test_options_that_have_no_meaning(monkeypatch):
    with pytest.raises(ConfigError, match="--cfg has no meaning for a sweep"):
        main(["-m", *HEAD, "seed=0,1", "--cfg", "job"])
    with pytest.raises(ConfigError, match="needs the name of a file"):
        main(["-m", *HEAD, "seed=0,1", "--write"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="cannot be started by torchrun"):
        main(["-m", *HEAD, "seed=0,1"])


def test_the_file_of_a_job_array(tmp_path, capsys, monkeypatch):
    file = tmp_path / "runs.txt"
    words = [*HEAD, "seed=0,1", "optimizer.betas=[0.9,0.95],[0.9,0.99]", "run.name=two words"]
    assert main(["--multirun", *words, "--write", str(file)]) == 0
    assert "4 runs: sbatch --array=1-4" in capsys.readouterr().out
    variants, _ = expand(words)
    for line, variant in zip(file.read_text().splitlines(), variants, strict=True):
        # As sweep.sbatch takes a line apart.
        parted = subprocess.run(["xargs", "printf", r"%s\0"], input=line, capture_output=True, text=True, check=True)
        assert parted.stdout.split("\0")[:-1] == list(variant.words)
    monkeypatch.delenv("REPA_SCALE_SWEEP", raising=False)
    assert name_of(words) == name_of(list(words)) != name_of(words[:-1])
    with pytest.raises(ConfigError, match="cannot be written"):
        main(["-m", *words, "--write", str(tmp_path / "none" / "runs.txt")])


def two_batches(digits):
    """The first run cannot be: its batch is larger than the set."""
    small = [word for word in SMALL if not word.startswith(("train.global_batch", "train.steps", "tracking"))]
    return [*small, f"data.path={digits}", "train.global_batch=4000,8", "train.steps=2", "run.dir=out"]


@pytest.mark.distributed
def test_a_run_that_fails_ends_the_sweep(digits, tmp_path):
    process = sweep([*two_batches(digits), "tracking.uri=none"], tmp_path)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 64 and "not started  train.global_batch=8" in out, out
    assert "has only 1797 samples" in out and not (tmp_path / "out").exists()


@pytest.mark.distributed
@pytest.mark.long
def test_a_sweep_that_keeps_going_is_found_by_its_tag(digits, tmp_path):
    words = [*two_batches(digits), "tracking.uri=sqlite:///mlflow.db", "tracking.experiment=swept", "--keep-going"]
    process = sweep(words, tmp_path, REPA_SCALE_SWEEP="mine")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 64 and "sweep mine: 1 of 2 runs completed" in out, out
    assert read_status(tmp_path / "out" / "global_batch-8")["state"] == "completed"
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("swept").experiment_id
    found = client.search_runs([experiment], "tags.sweep = 'mine'")
    assert len(found) == 1 and found[0].data.tags["pair_id"] in out


@pytest.mark.distributed
@pytest.mark.long
def test_a_wish_to_stop_saves_the_run_and_starting_again_goes_on(digits, tmp_path):
    small = [word for word in SMALL if not word.startswith("train.steps")]
    words = [*small, f"data.path={digits}", "seed=0,1", "train.steps=400", "run.dir=out"]
    process = sweep(words, tmp_path)
    deadline = time.monotonic() + 200
    while last_step(tmp_path / "out" / "seed-0") < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 75 and "not started  seed=1" in out, out
    assert read_status(tmp_path / "out" / "seed-0")["state"] == "preempted"
    process = sweep([word.replace("=400", "=100") for word in words], tmp_path)
    out, _ = process.communicate(timeout=280)
    assert process.returncode == 0 and "2 of 2 runs completed" in out, out
    assert last_step(tmp_path / "out" / "seed-1") == 100
