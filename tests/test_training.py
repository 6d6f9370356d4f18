"""Real runs of real processes: any way of starting, splitting and resuming a run gives the same numbers."""

import json
import os
import re
import signal
import time

import pytest
from launching import SMALL, Launch, assert_close, end_all, exact, train

from repa_scale.checkpoint import CheckpointReader
from repa_scale.run_folder import read_metrics, read_status

pytestmark = pytest.mark.distributed


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    end_all()


@pytest.fixture(scope="module")
def words(digits):
    return [*SMALL, f"data.path={digits}"]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    """The plain run that the others are compared with: 2 processes, fp32, ZeRO stage 3."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    rows = train([*words, "train.checkpoint_every=6"], run, 2, "deepspeed")
    return run, rows


def test_a_run_learns_and_leaves_what_is_promised(undisturbed):
    run, rows = undisturbed
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["denoising_loss"] < rows[0]["denoising_loss"] and rows[-1]["alignment_loss"] < 0
    for key in ("images_per_second", "data_wait_seconds", "encoder_seconds", "alignment_seconds", "peak_memory_bytes"):
        assert rows[-1][key] > 0, key
    assert sorted(os.listdir(run)) >= ["checkpoints", "config.yaml", "identity.json", "log", "metrics.jsonl"]
    assert (run / "log" / "rank_0.log").exists() and (run / "log" / "rank_1.log").exists()
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    status = read_status(run)
    assert (status["state"], status["step"], status["attempt"]) == ("completed", 12, 1)


def test_nearly_all_elements_are_really_partitioned(undisturbed):
    run, _ = undisturbed
    log = (run / "log" / "rank_0.log").read_text()
    share = re.search(r"under ZeRO stage 3 on 2 ranks, ([\d.]+) % of the weights in shards", log)
    assert float(share[1]) >= 95.0
    reader = CheckpointReader(run / "checkpoints" / "step_00000012")
    reader.verify()
    sizes = [entry["bytes"] for entry in reader.manifest["files"].values()]
    assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_killed_run_goes_on_to_the_same_bits(words, undisturbed, tmp_path, precision):
    words = [*words, f"train.precision={precision}"]
    wanted = undisturbed[1] if precision == "fp32" else train(words, tmp_path / "undisturbed")
    words = [*words, "train.checkpoint_every=4"]
    first = Launch(words, tmp_path / "run", 2, "deepspeed", PYTHONHASHSEED="1")
    first.wait_for_step(7)
    first.kill()
    assert 7 <= max(row["step"] for row in read_metrics(tmp_path / "run")) < 12
    assert read_status(tmp_path / "run")["state"] == "running"
    rows = train(words, tmp_path / "run", PYTHONHASHSEED="2")
    assert exact(rows) == exact(wanted)
    assert {row["attempt"] for row in rows} == {1, 2}


def test_one_process_gives_what_two_give(words, undisturbed, tmp_path):
    assert_close(train(words, tmp_path / "run", 1, "alone"), undisturbed[1], 1e-5)


def test_a_run_of_two_processes_goes_on_with_one_and_back(words, undisturbed, tmp_path):
    train([*words, "train.steps=4"], tmp_path / "run")
    train([*words, "train.steps=8"], tmp_path / "run", 1, "alone")
    assert_close(train(words, tmp_path / "run"), undisturbed[1], 1e-5)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2])
def test_the_other_zero_stages(words, undisturbed, tmp_path, stage):
    """Stage 1 and 2 give stage 3's numbers, and take up its checkpoint."""
    import repa_scale.deepspeed_config as deepspeed_config

    settings = json.loads(deepspeed_config.packaged_file().read_text())
    settings["zero_optimization"]["stage"] = stage
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(settings))
    train([*words, "train.steps=4"], tmp_path / "run")
    assert_close(train([*words, f"deepspeed.config={file}"], tmp_path / "run"), undisturbed[1], 1e-5)


def test_accumulation_of_micro_batches(words, undisturbed, tmp_path):
    assert_close(train([*words, "train.micro_batch=1"], tmp_path / "run"), undisturbed[1], 1e-5)


def test_activation_checkpointing(words, undisturbed, tmp_path):
    rows = train([*words, "train.activation_checkpointing=true"], tmp_path / "run")
    assert_close(rows, undisturbed[1], 1e-5)


def test_torchrun(words, undisturbed, tmp_path):
    assert exact(train(words, tmp_path / "run", 2, "torchrun")) == exact(undisturbed[1])


def test_fp16_with_loss_scaling(words, undisturbed, tmp_path):
    rows = train([*words, "train.precision=fp16"], tmp_path / "run")
    applied = [row for row in rows if row["skipped_steps"] == rows[-1]["skipped_steps"]]
    assert rows[0]["loss_scale"] >= 1.0 and len(applied) >= 3
    assert [r["batch_fingerprint"] for r in rows] == [r["batch_fingerprint"] for r in undisturbed[1]]
    assert abs(rows[0]["loss"] - undisturbed[1][0]["loss"]) < 1e-2 * abs(undisturbed[1][0]["loss"])


def test_the_baseline_is_repa_with_weight_0_to_the_last_bit(words, tmp_path):
    """In the run with weight 0 the term and its encoder are really run."""
    baseline = train([*words, "method=baseline"], tmp_path / "baseline")
    weightless = train([*words, "alignment.repa.weight=0"], tmp_path / "weightless")
    assert [row["denoising_loss"] for row in baseline] == [row["denoising_loss"] for row in weightless]
    assert all(row["encoder_seconds"] > 0 and row["alignment_loss"] < 1 for row in weightless)
    assert all("alignment_loss" not in row and row.get("encoder_seconds", 0) < 1e-3 for row in baseline)


def test_sampling_changes_no_bit_of_the_training(words, undisturbed, tmp_path):
    rows = train([*words, "train.sample_every=3"], tmp_path / "run")
    assert exact(rows) == exact(undisturbed[1])
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == [
        f"step_{step:08d}.png" for step in (3, 6, 9, 12)
    ]


def test_a_term_that_stops_runs_its_encoder_no_more(words, tmp_path):
    rows = train([*words, "alignment.repa.stop_step=5"], tmp_path / "run", 1, "alone")
    assert [("alignment_loss" in row) for row in rows] == [True] * 4 + [False] * 8


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_sigterm_to_any_rank_saves_and_ends_with_75(words, undisturbed, tmp_path, rank):
    run = tmp_path / "run"
    launch = Launch([*words, "train.steps=100000"], run, 2, "torchrun")
    launch.wait_for_step(3)
    os.kill(launch.ranks()[rank], signal.SIGTERM)
    launch.wait()  # torchrun makes 1 of every code
    status = read_status(run)
    assert status["state"] == "preempted"
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"
    rows = train([*words, f"train.steps={status['step'] + 1}"], run)
    same = min(len(rows), 12)
    assert exact(rows)[:same] == exact(undisturbed[1])[:same]


def test_the_code_of_a_preempted_run_alone_is_75(words, tmp_path):
    launch = Launch([*words, "train.steps=100000"], tmp_path / "run", 1, "alone")
    launch.wait_for_step(2)
    (tmp_path / "run" / "stop").touch()
    assert launch.wait() == 75
    assert read_status(tmp_path / "run")["state"] == "preempted"


def test_a_folder_in_use_is_refused(words, tmp_path):
    run = tmp_path / "run"
    launch = Launch([*words, "train.steps=100000"], run, 1, "alone")
    launch.wait_for_step(1)
    try:
        second = Launch([*words, "train.steps=100000"], run, 1, "alone")
        assert second.wait() == 64, second.text()
        assert "is in use" in second.text() and "Traceback" not in second.text()
        before = launch.process.poll()
        time.sleep(0.5)
        assert before is None and launch.process.poll() is None, "the first run must not notice"
    finally:
        launch.kill()


def test_a_completed_run_stays_as_it_is(words, undisturbed):
    run, rows = undisturbed
    assert exact(train([*words, "train.checkpoint_every=6"], run)) == exact(rows)
