"""The way of a run through the verbs: train both methods, sample, evaluate, compare, export; and every wrong word."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import SMALL, train
from PIL import Image
from safetensors.torch import load_file

from repa_scale import cli
from repa_scale.run_folder import read_metrics

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def pair(digits, tmp_path_factory):
    """A REPA run and its baseline, tracked in one store."""
    folder = tmp_path_factory.mktemp("pair")
    words = [*SMALL, f"data.path={digits}", f"tracking.uri=sqlite:///{folder}/mlflow.db", "train.sample_every=6"]
    words += ["tracking.experiment=pairs", "train.checkpoint_every=6"]
    for method in ("repa", "baseline"):
        train([*words, f"method={method}"], folder / method, 1, "alone")
    return folder


def run(*words):
    """A verb as a user types it: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-m", "repa_scale", *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def refused(*words):
    """The one line with which a user's mistake is answered."""
    code, _, errors = run(*words)
    lines = [line for line in errors.splitlines() if "real_accelerator" not in line]
    assert code == 64 and len(lines) == 1 and lines[0].startswith("repa-scale: error: "), (code, errors)
    return lines[0]


def test_every_number_of_the_report_is_the_run_folders(pair, tmp_path):
    uri = f"sqlite:///{pair}/mlflow.db"
    code, out, _ = run("compare", "--uri", uri, "--experiment", "pairs", "--out", tmp_path / "report")
    assert code == 0 and "index.html" in out
    result = json.loads((tmp_path / "report" / "compare.json").read_text())
    for method in ("repa", "baseline"):
        rows = read_metrics(pair / method)
        for metric in ("denoising_loss", "loss", "grad_norm", "images_per_second", "encoder_seconds", "step_seconds"):
            if metric not in rows[0]:
                continue
            shown = {step: value for step, _, value in result["curves"][metric][method]}
            assert shown == {row["step"]: row[metric] for row in rows}, (method, metric)
        summary = result["summary"][method]
        assert summary["last_step"] == 12
        mean = sum(row["step_seconds"] for row in rows[1:]) / 11
        assert summary["step_seconds"] == pytest.approx(mean, rel=1e-12)
    assert result["losses"]["repa"] == read_metrics(pair / "repa")[-1]["denoising_loss"]
    assert result["summary"]["repa"]["encoder_share"] > 0 and result["summary"]["baseline"]["encoder_share"] < 0.01
    differing = {row["key"] for row in result["settings"] if row["differs"]}
    assert differing == {"method", "run.dir"}
    assert result["warnings"] == []
    with (
        Image.open(tmp_path / "report" / "samples.png") as both,
        Image.open(pair / "repa/samples/step_00000012.png") as one,
    ):
        assert both.width > 2 * one.width and both.height > one.height
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count('src="data:image/png;base64') == 2 and "http" not in page.split("</script>")[-1]
    assert "Denoising loss over steps" in page and "Denoising loss over time" in page


def test_two_folders_can_be_named_and_unfair_pairs_are_marked(pair, tmp_path):
    uri = f"sqlite:///{pair}/mlflow.db"
    code, out, _ = run("compare", "--uri", uri, "--runs", pair / "repa", pair / "repa", "--out", tmp_path / "report")
    assert code == 0 and "both runs have method=repa" in out


def test_comparisons_that_cannot_be_made(pair, tmp_path):
    uri = f"sqlite:///{pair}/mlflow.db"
    assert "does not exist" in refused("compare", "--uri", f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()
    assert "did you mean 'pairs'" in refused("compare", "--uri", uri, "--experiment", "pair")
    assert "no REPA run and baseline" in refused("compare", "--uri", uri, "--experiment", "pairs", "--pair", "x")
    assert "is not in this store" in refused("compare", "--uri", uri, "--runs", "a", "b")
    assert "is the server up" in refused("compare", "--uri", "http://127.0.0.1:9")


def test_samples_of_run_checkpoint_and_export_are_the_same(pair, tmp_path):
    words = ("--count", 12, "--steps", 3)
    assert run("export", pair / "repa", "--out", tmp_path / "export")[0] == 0
    checkpoint = pair / "repa" / "checkpoints" / "step_00000012"
    for name, source in (("run", pair / "repa"), ("checkpoint", checkpoint), ("export", tmp_path / "export")):
        code, out, errors = run("sample", source, "--out", tmp_path / name, *words)
        assert code == 0 and "12 samples" in out, errors
    archives = [np.load(tmp_path / name / "samples.npz") for name in ("run", "checkpoint", "export")]
    assert archives[0]["arr_0"].shape == (12, 8, 8, 3) and archives[0]["labels"].tolist() == [*range(10), 0, 1]
    assert all(np.array_equal(archives[0]["arr_0"], other["arr_0"]) for other in archives[1:])
    assert run("sample", pair / "repa", "--out", tmp_path / "batched", *words, "--batch", 5)[0] == 0
    assert np.array_equal(np.load(tmp_path / "batched" / "samples.npz")["arr_0"], archives[0]["arr_0"])
    assert run("sample", pair / "repa", "--out", tmp_path / "raw", *words, "--weights", "raw")[0] == 0
    assert not np.array_equal(np.load(tmp_path / "raw" / "samples.npz")["arr_0"], archives[0]["arr_0"])
    with Image.open(tmp_path / "run" / "grid.png") as grid:
        assert grid.width > 100
    made_by = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert made_by["step"] == 12 and made_by["guidance"] == 2.0


def test_an_older_checkpoint_is_used_when_the_newest_is_broken(pair, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(pair / "repa", copy)
    file = next((copy / "checkpoints" / "step_00000012").glob("rank_*"))
    file.write_bytes(file.read_bytes()[:-8])
    code, out, _ = run("sample", copy, "--out", tmp_path / "out", "--count", 1, "--steps", 1)
    assert code == 0 and "at step 6" in out


def test_two_processes_draw_the_same_samples(pair, tmp_path):
    from launching import BIN, free_port

    words = ["sample", str(pair / "repa"), "--count", "5", "--steps", "2", "--device", "cpu", "--out"]
    assert run(*words, tmp_path / "one")[0] == 0
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "repa_scale"]
    subprocess.run([*map(str, command), *words, str(tmp_path / "two")], check=True, capture_output=True)
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert np.array_equal(one, two)


def test_an_export_is_the_ema_under_public_names(pair, tmp_path):
    assert run("export", pair / "repa", "--out", tmp_path / "export", "--dtype", "bf16")[0] == 0
    tensors = load_file(tmp_path / "export" / "model.safetensors")
    assert {"pos_embed", "x_embedder.proj.weight", "blocks.1.attn.qkv.weight"} <= set(tensors)
    assert not any(name.startswith(("projectors", "model.")) for name in tensors)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    described = json.loads((tmp_path / "export" / "config.json").read_text())
    assert described["trained"]["step"] == 12 and described["trained"]["weights"] == "ema"
    assert str(pair) not in json.dumps(described["config"]), "no path of the machine travels with an export"


def test_training_goes_on_from_exported_weights(pair, digits, tmp_path):
    assert run("export", pair / "repa", "--out", tmp_path / "export", "--weights", "raw")[0] == 0
    words = [*SMALL, f"data.path={digits}", f"train.init_from={tmp_path}/export", "train.steps=2"]
    rows = train(words, tmp_path / "run", 1, "alone")
    assert rows[0]["denoising_loss"] < read_metrics(pair / "repa")[0]["denoising_loss"]
    other = [word for word in words if not word.startswith("model.name")]
    assert "does not fit this model" in refused("train", *other, "model.name=SiT-Nano/1", f"run.dir={tmp_path}/other")


def test_label_agreement(digits, tmp_path):
    """Real digits are read as their labels; noise is not."""
    from repa_scale.evaluate import main
    from repa_scale.evaluate.agreement import _read_real

    images, labels = _read_real(str(digits), 300)
    for name, samples, wanted in (
        ("real", images, (0.95, 1.0)),
        ("noise", np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8), (0.0, 0.3)),
    ):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "samples.npz", arr_0=samples, labels=labels)
        assert main([str(tmp_path / name), "--data", str(digits)]) == 0
        result = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert wanted[0] <= result["label_agreement"] <= wanted[1]
        assert result["agreement_on_held_out_real_images"] > 0.95


def test_wrong_words_of_the_verbs(pair, tmp_path):
    assert "is not a run folder with a checkpoint" in refused("sample", tmp_path, "--out", tmp_path / "s")
    assert "this model has labels 0 to 9" in refused("sample", pair / "repa", "--labels", 11, "--out", tmp_path / "s")
    assert "must be at least 1" in refused("sample", pair / "repa", "--count", 0, "--out", tmp_path / "s")
    assert "not an empty folder" in refused("export", pair / "repa", "--out", pair)
    assert "does not exist" in refused("evaluate", tmp_path, "--data", tmp_path)
    assert "did you mean 'sample'" in refused("sampel")


def test_the_table_of_verbs_is_complete():
    wanted = "prepare train launch supervise checkpoints sample evaluate compare export import serve doctor plan"
    assert set(wanted.split()) == set(cli.VERBS)
