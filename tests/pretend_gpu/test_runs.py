"""Runs of every kind on the pretend GPU: they complete, they give the CPU's numbers, and would not have with the two
mistakes that once kept every run from starting on a GPU."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from launching import Launch, exact

from pretend_gpu.launch import WORDS, finite, sheet, state
from repa_scale import deepspeed_config
from repa_scale.data.batches import open_dataset
from repa_scale.prepare import main as prepare
from repa_scale.run_folder import read_incidents, read_metrics, read_status
from repa_scale.sample import main as sample

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]  # the first test builds the device

LOSSES = ("loss", "denoising_loss", "alignment_loss")


@pytest.fixture(scope="module")
def data(digits):
    return f"data.path={digits}"


@pytest.fixture(scope="module")
def on_cpu(data, tmp_path_factory):
    """(run folder, metrics) of the run that the others are compared with: stage 3, fp32."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    return run, Launch([*WORDS, data, "train.device=cpu"], run, 1, "alone").succeed()


@pytest.fixture(scope="module")
def on_gpu(gpu, data, tmp_path_factory):
    """The same run on the pretend GPU."""
    run = tmp_path_factory.mktemp("gpu") / "run"
    return run, gpu.train(run, data)


def stage(number, folder):
    """The word for a ZeRO stage."""
    settings = json.loads(deepspeed_config.packaged_file().read_text())
    settings["zero_optimization"]["stage"] = number
    file = folder / f"stage_{number}.json"
    file.write_text(json.dumps(settings))
    return f"deepspeed.config={file}"


def assert_same_losses(ours, theirs, absolute=1e-6):
    assert [row["batch_fingerprint"] for row in ours] == [row["batch_fingerprint"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key in LOSSES:
            assert abs(a[key] - b[key]) <= absolute, (a["step"], key, a[key], b[key])


def stored_column(reader, column, dtype):
    """A set's column of features: a row for each sample, float32."""
    rows = [torch.frombuffer(bytearray(reader[number][column]), dtype=dtype) for number in range(16)]
    return torch.stack(rows).float()


def test_it_gives_the_numbers_of_the_cpu(on_gpu, on_cpu):
    (run, rows), (reference, wanted) = on_gpu, on_cpu
    tags = json.loads((run / "tags.json").read_text())
    assert (tags["device"], tags["zero_stage"], tags["precision"]) == ("pretend GPU", "3", "fp32")
    assert_same_losses(rows, wanted)
    for kind in ("master", "ema", "exp_avg", "exp_avg_sq"):
        assert (state(run, kind) - state(reference, kind)).abs().max() <= 1e-7, kind
    assert sheet(run) == sheet(reference)


def test_a_run_that_ended_in_between_goes_on_to_the_same_bits(gpu, on_gpu, data, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(on_gpu[0], run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "checkpoints" / "latest").write_text("step_00000002\n")
    rows = gpu.train(run, data)
    assert [row["attempt"] for row in rows] == [1, 1, 2, 2]
    assert exact(rows) == exact(on_gpu[1])
    assert torch.equal(state(run, "master"), state(on_gpu[0], "master"))


def test_stage_2(gpu, on_cpu, data, tmp_path):
    run = tmp_path / "run"
    assert_same_losses(gpu.train(run, data, stage(2, tmp_path)), on_cpu[1])
    assert (state(run, "master") - state(on_cpu[0], "master")).abs().max() <= 1e-7


def test_stage_1_in_bf16_leaves_a_step_out_that_is_not_finite(gpu, data, tmp_path):
    run = tmp_path / "run"
    words = [data, stage(1, tmp_path), "train.precision=bf16"]
    rows = gpu.train(run, *words, FAULTS=json.dumps([["nan", 0, 3, 3]]))
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1] and finite(rows, 3)
    assert state(run, "master").isfinite().all() and state(run, "ema").isfinite().all()


def test_bf16_in_micro_batches_recomputed_and_evaluated(gpu, on_cpu, data, tmp_path):
    """And, beside these: deterministic algorithms, and samples of the SDE with guidance."""
    run = tmp_path / "run"
    rows = gpu.train(
        run,
        data,
        "train.precision=bf16",
        "train.micro_batch=4",
        "train.activation_checkpointing=true",
        "train.deterministic=true",
        "sample.sampler=sde",
        "sample.guidance=2.0",
        "evaluate.every=4",
        "evaluate.count=4",
        "evaluate.reference_count=8",
    )
    assert_same_losses(rows, on_cpu[1], 2e-2)
    (line,) = (run / "evaluations.jsonl").read_text().splitlines()
    assert math.isfinite(json.loads(line)["value"])
    assert sheet(run)


def test_fp16_scales_its_loss(gpu, on_cpu, data, tmp_path):
    rows = gpu.train(tmp_path / "run", data, "train.precision=fp16")
    assert rows[0]["loss_scale"] >= 1.0 and finite(rows) and not rows[-1]["skipped_steps"]
    assert_same_losses(rows, on_cpu[1], 2e-2)


def test_compiled_blocks(gpu, on_cpu, data, tmp_path):
    """Traced whole and differentiated ahead of time under stage 3; Inductor is left out."""
    words = ["train.compile=true", "train.activation_checkpointing=true", "train.sample_every=0"]
    assert_same_losses(gpu.train(tmp_path / "run", data, *words, change="aot_eager"), on_cpu[1], 1e-5)


def test_a_run_rolls_back(gpu, on_cpu, data, tmp_path):
    run = tmp_path / "run"
    rows = gpu.train(run, data, "health.max_skips=1", FAULTS=json.dumps([["nan", 0, 3, 4]]))
    (incident,) = (found for found in read_incidents(run) if found["kind"] == "rollback")
    assert (incident["step"], incident["to_step"], incident["left_out"]) == (3, 2, [3, 4])
    assert [row["attempt"] for row in rows] == [1, 1, 2, 2] and finite(rows)
    assert_same_losses(rows[:2], on_cpu[1][:2])


def test_samples_of_a_run_are_those_of_the_cpu(gpu, on_gpu, tmp_path):
    words = [str(on_gpu[0]), "--n", "6", "--sampler", "heun", "--steps", "3", "--guidance", "1.5", "--out"]
    gpu.run("sample", *words, tmp_path / "gpu.npz", "--device", "cuda")
    assert sample([*words, str(tmp_path / "cpu.npz"), "--device", "cpu"]) == 0
    ours, theirs = (np.load(tmp_path / f"{name}.npz") for name in ("gpu", "cpu"))
    assert (ours["labels"] == theirs["labels"]).all()
    assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"].astype(int)).max() <= 1


def test_a_vae_and_dinov2(gpu, tmp_path):
    """With random weights: the networks of the real job, on 32-pixel images."""
    assert prepare(["digits", "--out", str(tmp_path / "set"), "--size", "32", "--limit", "16"]) == 0
    rows = gpu.train(
        tmp_path / "run",
        f"data.path={tmp_path / 'set'}",
        "data.image_size=32",
        "latents.name=sd-vae-ft-mse",
        "latents.weights=random",
        "alignment.repa.encoder=dinov2-vit-s",
        "alignment.repa.weights=random",
        "train.steps=2",
        "train.precision=bf16",
    )
    assert finite(rows) and sheet(tmp_path / "run")


def test_stored_features_are_made_and_read(gpu, tmp_path):
    """`prepare` on the device stores what it stores on a CPU, and a run reads it."""
    words = ["digits", "--size", "8", "--limit", "16", "--moments", "identity-grey", "--token-grid", "4"]
    words += ["--tokens", "effnet-lite0=package", "--out"]
    gpu.run("prepare", *words, tmp_path / "gpu")
    assert prepare([*words, str(tmp_path / "cpu")]) == 0
    ours, theirs = (open_dataset(str(tmp_path / name)).reader for name in ("gpu", "cpu"))
    # On a GPU the encoder computes in bf16.
    for column, dtype, nearest in (("moments", torch.float32, 1 - 1e-6), ("tokens.effnet-lite0", torch.bfloat16, 0.99)):
        a, b = (stored_column(reader, column, dtype) for reader in (ours, theirs))
        assert torch.nn.functional.cosine_similarity(a, b, dim=1).min() >= nearest, column
    settings = [f"data.path={tmp_path / 'gpu'}", "data.source=moments+tokens", "train.steps=2"]
    assert finite(gpu.train(tmp_path / "run", *settings))


@pytest.mark.parametrize("mistake", ["buffers_stay", "host_scalar"])
def test_a_tensor_left_on_the_host_ends_the_run(gpu, data, tmp_path, mistake):
    """Each of these once kept every run from its first step on a GPU, and no test on a CPU could tell."""
    ended = gpu.start("train", *WORDS, data, "train.device=cuda", f"run.dir={tmp_path / 'run'}", change=mistake)
    assert ended.code == 70, ended.text
    last = [line for line in ended.text.splitlines() if "Error" in line][-1]
    assert "Expected all tensors to be on the same device" in last, ended.text
    assert "same device" in read_status(tmp_path / "run")["reason"]
    assert read_metrics(tmp_path / "run") == []
