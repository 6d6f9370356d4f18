"""Data in real runs: decoders, and samples that cannot be read."""

import json
import shutil

import pytest
import torch
from launching import SMALL, Launch, assert_close, end_all, exact, train

from repa_scale.checkpoint import CheckpointReader
from repa_scale.data.dataset import open_dataset
from repa_scale.data.order import Order
from repa_scale.run_folder import read_status

pytestmark = pytest.mark.distributed
STEP, PLACE = 5, 3  # where the broken sample comes, in batches of 8


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    end_all()


@pytest.fixture(scope="module")
def broken(digits, tmp_path_factory):
    """The digits, one of whose pictures cannot be decoded: it comes at STEP."""
    copy = tmp_path_factory.mktemp("broken") / "set"
    shutil.copytree(digits, copy)
    dataset = open_dataset(copy, verify=False)
    order = Order([shard.samples for shard in dataset.reader.shards], 0, dataset.fingerprint)
    number = int(order.at(torch.tensor([(STEP - 1) * 8 + PLACE])))
    row = dataset.reader[number]
    shard = copy / dataset.reader.shards[0].basename
    shard.write_bytes(shard.read_bytes().replace(row["image"], b"\x00" + row["image"][1:]))
    return copy, row["id"]


def quarantine(run):
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def test_decoders_and_ranks_leave_out_the_same_sample(broken, tmp_path):
    folder, identity = broken
    words = [*SMALL, f"data.path={folder}", "data.verify=false", "train.steps=20"]
    pillow = train([*words, "data.decoder=pillow"], tmp_path / "pillow", 1, "alone")
    dali = train([*words, "data.decoder=dali"], tmp_path / "dali", 1, "alone")
    assert exact(dali) == exact(pillow)
    assert_close(train(words, tmp_path / "two"), pillow, 1e-5)
    for run in ("pillow", "dali", "two"):
        (row,) = quarantine(tmp_path / run)
        assert (row["step"], row["position"], row["id"]) == (STEP, (STEP - 1) * 8 + PLACE, identity)
        assert "cannot be decoded" in row["reason"]


def test_too_many_bad_samples_stop_the_run_saved(broken, tmp_path):
    run = tmp_path / "run"
    words = [*SMALL, f"data.path={broken[0]}", "data.verify=false", "data.max_bad=0.05%"]
    launch = Launch(words, run, 1, "alone")
    assert launch.wait() == 64
    status = read_status(run)
    assert (status["state"], status["step"]) == ("failed", STEP)
    assert "1 of 1797 samples cannot be read, more than data.max_bad=0.05%" in status["reason"]
    CheckpointReader(run / "checkpoints" / f"step_{STEP:08d}").verify()
    rows = train([*words, "data.max_bad=0.2%"], run, 1, "alone")
    assert rows[-1]["step"] == 12 and len(quarantine(run)) == 1
