"""What a user can get wrong in `train`: one clear line, exit code 64, and nothing else is touched."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from launching import SMALL
from safetensors.torch import save_file

GPU = torch.cuda.is_available()


def refused(words, tmp_path):
    """The one line of `repa-scale train`; the run folder must not have come into being."""
    run = tmp_path / "run"
    words = [*words, *([] if any(word.startswith("run.dir=") for word in words) else [f"run.dir={run}"])]
    done = subprocess.run(
        [sys.executable, "-m", "repa_scale", "train", *words], capture_output=True, text=True, cwd=tmp_path
    )
    lines = [line for line in done.stderr.splitlines() if "real_accelerator" not in line]
    assert done.returncode == 64, done.stderr
    assert len(lines) == 1 and lines[0].startswith("repa-scale: error: "), done.stderr
    assert not run.exists()
    return lines[0]


CASES = {
    "an unknown key": (["optimizer.lr=1"], "did you mean"),
    "an unknown preset": (["experiment=demo_rep"], "did you mean 'demo_repa'"),
    "an unknown encoder": (["alignment.repa.encoder=dinov2-vitb"], "did you mean 'dinov2-vit-b'"),
    "an unknown model": (["model.name=SiT-Tin/2"], "did you mean"),
    "an unknown patch": (["model.name=SiT-Tiny/3"], "1, 2, 4, 8"),
    "an unknown path type": (["interpolant.path=linaer"], "did you mean 'linear'"),
    "an unknown method": (["method=repaa"], "did you mean 'repa'"),
    "a value of another type": (["train.steps=many"], "train.steps"),
    "a micro batch that does not divide": (["train.micro_batch=3"], "train.micro_batch=3"),
    "a depth beyond the model": (["alignment.repa.depth=9"], "depth=9"),
    "a size that the patch does not divide": (["model.name=SiT-Nano/8", "data.image_size=12"], "12"),
    "another number of classes": (["model.num_classes=7"], "has 10 classes; use model.num_classes=10"),
    "another size": (["data.image_size=16"], "holds images of 8 px"),
    "too few samples": (["train.global_batch=2048"], "has only 1797 samples"),
    "a missing data folder": (["data.path=nowhere"], "data.path=nowhere is not a folder"),
    "an empty data path": (["data.path="], "data.path"),
    "a missing DeepSpeed file": (["deepspeed.config=none.json"], "none.json"),
    "a missing file of weights": (["train.init_from=none.safetensors"], "does not exist"),
    "a missing file of the encoder": (["alignment.repa.weights=none.pth"], "the path does not exist"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line(digits, tmp_path, case):
    words, message = CASES[case]
    assert message in refused([*SMALL, f"data.path={digits}", *words], tmp_path)


def test_an_empty_data_folder(tmp_path):
    (tmp_path / "data").mkdir()
    assert "is not a prepared set" in refused([*SMALL, f"data.path={tmp_path}/data"], tmp_path)


@pytest.mark.skipif(GPU, reason="there is a CUDA device")
def test_cuda_where_there_is_none(digits, tmp_path):
    assert "device cuda: torch" in refused([*SMALL, f"data.path={digits}", "train.device=cuda"], tmp_path)


def test_public_weights_with_missing_and_extra_tensors(digits, tmp_path):
    save_file({"blocks.0.attn.qkv.bias": torch.zeros(96), "surplus": torch.zeros(1)}, tmp_path / "w.safetensors")
    line = refused([*SMALL, f"data.path={digits}", f"train.init_from={tmp_path}/w.safetensors"], tmp_path)
    assert "not expected: surplus" in line and "missing: " in line and "x_embedder.proj.weight" in line


def test_a_contradiction_names_both_places(digits, tmp_path):
    import json

    from repa_scale.deepspeed_config import packaged_file

    settings = json.loads(packaged_file().read_text())
    settings["train_batch_size"] = 128
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    line = refused([*SMALL, f"data.path={digits}", f"deepspeed.config={tmp_path}/ds.json"], tmp_path)
    assert "train_batch_size=128" in line and "train.global_batch=8" in line


def test_a_damaged_shard_is_found_before_training(digits, tmp_path):
    shutil.copytree(digits, tmp_path / "data")
    shard = tmp_path / "data" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert "sha256" in refused([*SMALL, f"data.path={tmp_path}/data"], tmp_path)


def test_a_disk_without_room_for_a_checkpoint(digits, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        words = [*SMALL, f"data.path={digits}", "model.name=SiT-Tiny/2", f"run.dir={small}/run"]
        assert "its disk has" in refused(words, tmp_path)
        assert not (small / "run").exists()
    finally:
        subprocess.run(["umount", small], check=True)
