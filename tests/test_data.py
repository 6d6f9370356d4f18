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

from repa_scale.data.bad import Quarantine
from repa_scale.data.batches import Batches, check_dataset, open_dataset
from repa_scale.data.order import WINDOW, Order
from repa_scale.errors import ConfigError, DataError
from repa_scale.rng import fingerprint


def first_batches(dataset, count, *, start=0, world=1, workers=0, seed=0, global_batch=8, **words):
    """The global batches of `count` steps, put together from the ranks' parts."""
    parts = []
    for rank in range(world):
        own = {"seed": seed, "global_batch": global_batch, "rank": rank, "world": world, "workers": workers}
        source = Batches(dataset, start_step=start, **own, **words)
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


@pytest.mark.parametrize("shards", [[1797], [100] * 17 + [97], [3, 1, 2] * 9])
def test_every_epoch_has_every_sample_once(shards):
    n = sum(shards)
    order = Order(shards, 0, "f")
    for epoch in range(3):
        samples = order.at(torch.arange(epoch * n, (epoch + 1) * n))
        assert torch.equal(samples.sort().values, torch.arange(n))
    across = order.at(torch.arange(n - 5, n + 5))
    assert torch.equal(across[:5], order.at(torch.arange(n - 5, n)))
    assert not torch.equal(order.at(torch.arange(n)), Order(shards, 0, "g").at(torch.arange(n)))
    assert not torch.equal(order.at(torch.arange(n)), order.at(torch.arange(n, 2 * n)))


def test_a_cold_cache_is_read_almost_sequentially():
    """Each shard is needed within one window of positions, and `shards_from` names it before."""
    shards = [50] * 20
    order = Order(shards, 3, "f")
    touched = (order.at(torch.arange(sum(shards))) // 50).tolist()
    for shard in range(20):
        places = [i for i, one in enumerate(touched) if one == shard]
        assert len(places) == 50 and max(places) - min(places) < WINDOW * 50
    for position in range(0, 2000, 7):
        wanted = order.shards_from(position)
        assert len(wanted) <= 2 * WINDOW
        assert set((order.at(torch.arange(position, position + 50)) // 50).tolist()) <= set(wanted)


def test_the_shuffle_is_nearly_as_good_as_a_full_one():
    """Samples that were neighbours in the set meet in a batch hardly more often than by chance within a window."""
    n, batch = 64 * 1000, 256
    order = Order([1000] * 64, 0, "f").at(torch.arange(n))
    place = torch.empty(n, dtype=torch.long)
    place[order] = torch.arange(n) // batch
    together = (place[1:] == place[:-1]).double().mean().item()
    assert 0.5 * batch / n < together < 1.3 * batch / (WINDOW * 1000)
    distances = (place[1:] - place[:-1]).abs().double().mean().item()
    assert distances == pytest.approx(WINDOW * 1000 / batch / 3, rel=0.1)  # a full shuffle of a window


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


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory):
    """The digits in some thirty shards."""
    from repa_scale.data import ingest
    from repa_scale.prepare import main

    out = tmp_path_factory.mktemp("shards") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "SHARD_BYTES", 15_000)
        main(["digits", "--out", str(out), "--size", "8", "--workers", "1"])
    assert len(open_dataset(out).reader.shards) > 2 * WINDOW
    return out


def test_an_epoch_of_many_shards_is_the_same_for_any_ranks_and_workers(many_shards):
    """Fingerprint by fingerprint, also when 2 ranks become 1 in the middle; every id once."""
    dataset = open_dataset(many_shards)
    steps = -(-1797 // 32)
    wanted = fingerprints(dataset, steps)
    for world, workers in ((1, 1), (2, 0), (4, 0), (2, 3)):
        assert fingerprints(dataset, steps, world=world, workers=workers) == wanted, (world, workers)
    middle = fingerprints(dataset, 20, world=2) + fingerprints(dataset, steps - 20, start=20)
    assert middle == wanted
    ids = torch.cat([batch["ids"] for batch in first_batches(dataset, steps, global_batch=32)])[:1797]
    assert len(set(ids.tolist())) == 1797


def fingerprints(dataset, steps, **words):
    return [fingerprint(batch["ids"]) for batch in first_batches(dataset, steps, global_batch=32, **words)]


def broken_copy(source, folder, number):
    """The set with the picture of one sample made unreadable, behind the back of the hashes."""
    copy = folder / "broken"
    shutil.copytree(source, copy)
    dataset = open_dataset(copy, verify=False)
    which, _ = dataset.reader.locate(number)
    shard = copy / dataset.reader.shards[which].basename
    picture = dataset.reader[number]["image"]
    data = shard.read_bytes()
    assert data.count(picture) == 1
    shard.write_bytes(data.replace(picture, b"\x00" + picture[1:]))
    return open_dataset(copy, verify=False)


def test_a_broken_picture_is_replaced_by_the_same_one_everywhere(many_shards, tmp_path):
    whole = open_dataset(many_shards)
    number = int(Order([s.samples for s in whole.reader.shards], 0, whole.fingerprint).at(torch.tensor([21])))
    broken = broken_copy(many_shards, tmp_path, number)
    good = first_batches(whole, 4)
    wanted = first_batches(broken, 4)
    changed = [
        i for i in range(32) if torch.cat([b["ids"] for b in good])[i] != torch.cat([b["ids"] for b in wanted])[i]
    ]
    assert changed == [21]
    for world, workers, decoder in ((2, 0, "pillow"), (4, 2, "pillow"), (1, 0, "dali"), (2, 1, "dali")):
        assert equal(first_batches(broken, 4, world=world, workers=workers, decoder=decoder), wanted), (world, workers)
    (bad,) = [sample for batch in batches_of(broken, 4) for sample in batch.bad]
    assert (bad.number, bad.position, bad.id) == (number, 21, whole.reader[number]["id"])
    assert "cannot be decoded" in bad.reason and bad.shard.startswith("shard.")


def batches_of(dataset, steps):
    source = Batches(dataset, seed=0, global_batch=8, rank=0, world=1, workers=0, start_step=0)
    stream = iter(source)
    return [next(stream) for _ in range(steps)]


@pytest.mark.parametrize("damage", ["deleted", "truncated", "flipped"])
def test_a_damaged_shard_is_found_by_its_hash_and_its_samples_are_replaced(many_shards, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(many_shards, copy)
    dataset = open_dataset(copy)
    shard = copy / dataset.reader.shards[3].basename
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "deleted":
        shard.unlink()
    else:
        shard.write_bytes(bytes(data[:-1]) if damage == "truncated" else bytes(data))
    found = dataset.verify()
    assert list(found) == [3] and shard.name in found[3] and "\n" not in found[3]
    dataset.reader.bad |= found
    inside = set(range(sum(s.samples for s in dataset.reader.shards[:3]), dataset.count))
    inside &= set(range(sum(s.samples for s in dataset.reader.shards[:4])))
    left_out = [sample for batch in batches_of(dataset, 1797 // 8) for sample in batch.bad]
    assert {sample.number for sample in left_out} >= inside - {s.number for s in left_out if s.position >= 1792}
    assert {sample.number for sample in left_out} <= inside and all(s.id is None for s in left_out)
    quarantine = Quarantine(dataset.count, "0.1%")
    assert quarantine.add(left_out) and not quarantine.add(left_out) and "data.max_bad=0.1%" in quarantine.problem
    assert not Quarantine(dataset.count, "20%").problem
    with pytest.raises(DataError, match=r"more than data\.max_bad=0\.1% allows"):
        quarantine.refuse({shard.name: found[3]}, len(inside))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_that_cannot_be_read_at_all_is_one_line(tmp_path, digits, workers):
    copy = tmp_path / "copy"
    shutil.copytree(digits, copy)
    dataset = open_dataset(copy, verify=False)
    shard = copy / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"\x00PNG"))
    source = Batches(dataset, seed=0, global_batch=8, rank=0, world=1, workers=workers, start_step=0)
    with pytest.raises(DataError, match=r"samples in a row cannot be read.*cannot be decoded") as error:
        next(iter(source))
    assert "\n" not in str(error.value)
    source.close()


def test_pictures_are_mirrored_by_half(digits):
    dataset = open_dataset(digits)
    plain, mirrored = first_batches(dataset, 8), first_batches(dataset, 8, flip=True)
    flipped = 0
    for a, b in zip(plain, mirrored, strict=True):
        for one, other in zip(a["images"], b["images"], strict=True):
            assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
            flipped += not torch.equal(one, other)
    assert 20 <= flipped <= 44
    assert equal(first_batches(dataset, 8, world=2, flip=True, decoder="dali"), mirrored)


# A process that reads 100,000 batches by two workers, says which they are, and notes a SIGTERM without ending.
READS = """
import multiprocessing, signal, sys, time
from repa_scale.data.bad import Quarantine
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
