"""The order of samples and the batches: the same for any number of ranks and workers, from any step on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from repa_scale.data.batches import Batches, check_dataset, open_dataset
from repa_scale.data.order import sample_at
from repa_scale.errors import ConfigError, DataError


def first_batches(dataset, count, *, start=0, world=1, workers=0, seed=0, global_batch=8):
    """The global batches of `count` steps, put together from the ranks' parts."""
    parts = []
    for rank in range(world):
        source = Batches(
            dataset, seed=seed, global_batch=global_batch, rank=rank, world=world, workers=workers, start_step=start
        )
        stream = iter(source)
        parts.append([next(stream) for _ in range(count)])
        source.close()
    return [
        {
            key: torch.cat([getattr(rank[step], key) for rank in parts])
            for key in ("images", "labels", "ids", "index")
        }
        for step in range(count)
    ]  # fmt: skip


def equal(ours, theirs):
    return all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in a)


def test_any_ranks_workers_and_resume_give_the_same_batches(digits):
    dataset = open_dataset(digits)
    wanted = first_batches(dataset, 5)
    assert wanted[0]["images"].shape == (8, 3, 8, 8) and wanted[0]["images"].dtype == torch.uint8
    assert wanted[2]["index"].tolist() == list(range(16, 24))
    for world, workers in ((2, 0), (4, 0), (1, 1), (2, 3)):
        assert equal(first_batches(dataset, 5, world=world, workers=workers), wanted), (world, workers)
    assert equal(first_batches(dataset, 3, start=2), wanted[2:])
    assert not equal(first_batches(dataset, 5, seed=1), wanted)


def test_every_epoch_has_every_sample_once(digits):
    n = 1797
    for epoch in range(3):
        samples = sample_at(torch.arange(epoch * n, (epoch + 1) * n), n, 0, "f")
        assert torch.equal(samples.sort().values, torch.arange(n))
    across = sample_at(torch.arange(n - 5, n + 5), n, 0, "f")
    assert torch.equal(across[:5], sample_at(torch.arange(n - 5, n), n, 0, "f"))
    assert not torch.equal(sample_at(torch.arange(n), n, 0, "f"), sample_at(torch.arange(n), n, 0, "g"))


def test_what_a_batch_holds_is_the_set(digits):
    dataset = open_dataset(digits)
    batch = first_batches(dataset, 1)[0]
    ids = {dataset.reader[i]["id"]: dataset.reader[i]["label"] for i in range(dataset.count)}
    assert len(ids) == dataset.count
    assert [ids[i] for i in batch["ids"].tolist()] == batch["labels"].tolist()


def test_micro_batches_are_parts_in_order(digits):
    source = Batches(open_dataset(digits), seed=0, global_batch=8, rank=0, world=1, workers=0, start_step=0)
    batch = next(iter(source))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 3, 2]
    assert torch.equal(torch.cat([part.ids for part in parts]), batch.ids)
    assert len(batch.split(None)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 8, 8), "has 10 classes; use model.num_classes=10"),
        ((10, 16, 8), "holds images of 8 px"),
        ((10, 8, 4096), "has only 1797 samples"),
    ],
)
def test_a_set_that_does_not_fit_the_run(digits, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_dataset(open_dataset(digits), *arguments)
    check_dataset(open_dataset(digits), 10, 8, 64)


def test_folders_that_are_no_set(tmp_path, digits):
    for path, message in (
        (tmp_path / "none", "is not a folder"),
        (tmp_path, "is not a prepared set"),
        ("", "is empty"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(path)
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["class_names"][0] = "nought"
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="fingerprint"):
        open_dataset(copy)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_during_training_is_one_line(tmp_path, digits, workers):
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    dataset = open_dataset(copy, verify=False)
    shard = copy / "shard.00000.mds"
    data = shard.read_bytes()
    shard.write_bytes(data.replace(b"\x89PNG", b"\x00PNG"))
    source = Batches(dataset, seed=0, global_batch=8, rank=0, world=1, workers=workers, start_step=0)
    with pytest.raises(DataError, match="cannot be decoded") as error:
        next(iter(source))
    assert "\n" not in str(error.value)
    source.close()
    with pytest.raises(DataError, match="is damaged"):
        open_dataset(copy).verify()
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match="bytes instead of"):
        open_dataset(copy).verify()


# A process that reads 100,000 batches by two workers, says which they are, and notes a SIGTERM without ending.
READS = """
import multiprocessing, signal, sys, time
from repa_scale.data.batches import Batches, open_dataset
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
source = Batches(open_dataset(sys.argv[1]), seed=0, global_batch=8, rank=0, world=1, workers=2, start_step=0)
after = 0
for number, batch in enumerate(source):
    if number == 0:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(0.001)
    after += bool(told)
    if after == 200:
        break
source.close()
print("well", flush=True)
"""


@pytest.fixture
def reader(digits):
    """The process and its workers' numbers."""
    process = subprocess.Popen(
        [sys.executable, "-c", READS, str(digits)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    yield process, workers
    for pid in (process.pid, *workers):
        if lives(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stop_signal_to_all_processes_leaves_the_loader_running(reader):
    process, workers = reader
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout.read() == "well\n"
    assert process.wait(60) == 0 and not any(map(lives, workers))


def test_workers_end_when_their_parent_is_killed(reader):
    process, workers = reader
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while any(map(lives, workers)):
        assert time.monotonic() < deadline, "a worker goes on without its parent"
        time.sleep(0.1)


def test_a_killed_worker_ends_the_run_with_one_line(digits):
    source = Batches(open_dataset(digits), seed=0, global_batch=8, rank=0, world=1, workers=2, start_step=0)
    with pytest.raises(RuntimeError, match="worker") as error:
        for number, _ in enumerate(source):
            if number == 0:
                os.kill(source._stream._workers[0].pid, signal.SIGKILL)
            assert number < 10000
    assert "\n" not in str(error.value)
    source.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_and_open_files_stay_level(digits, workers):
    source = Batches(open_dataset(digits), seed=0, global_batch=64, rank=0, world=1, workers=workers, start_step=0)
    seen = []
    for number, _ in enumerate(source):
        if number in (100, 500):
            with open("/proc/self/statm") as file:
                seen.append((int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE"), len(os.listdir("/proc/self/fd"))))
        if number == 500:
            break
    source.close()
    assert seen[1][0] - seen[0][0] < 8 << 20, "some 28 MB of images were read between"
    assert seen[1][1] - seen[0][1] < 40
