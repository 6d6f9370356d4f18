# ruff: noqa: F401, F811 (fixtures are imported)
"""A set in a real S3-compatible store, read through a cache that is smaller than it."""

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from launching import SMALL, Launch, exact, train
from s3_server import s3_server
from test_data import equal, first_batches, many_shards

from repa_scale.config import DataConfig
from repa_scale.data.batches import Batches
from repa_scale.data.dataset import open_configured, open_dataset
from repa_scale.data.order import WINDOW
from repa_scale.errors import ConfigError, UserError

STEPS = 1797 // 32


@pytest.fixture(scope="module")
def remote(s3_server, many_shards):
    s3_server.upload(many_shards, "sets", "digits")
    return "s3://sets/digits"


@pytest.fixture
def limit(many_shards):
    """Two windows and one shard: less than the set."""
    largest = max(shard.bytes for shard in open_dataset(many_shards).reader.shards)
    return (2 * WINDOW + 1) * largest


@pytest.fixture(autouse=True)
def no_fetcher_stays(tmp_path):
    yield
    subprocess.run(["pkill", "-9", "-f", f"repa_scale.data.fetcher .*{tmp_path}"], check=False)


def opened(remote, folder, limit=""):
    return open_configured(DataConfig(remote=remote, cache=str(folder), cache_limit=str(limit)))


def fetcher_of(folder):
    found = subprocess.run(["pgrep", "-f", f"repa_scale.data.fetcher .*{folder}"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def held(dataset):
    return [path for path in dataset.path.glob("*.mds") if path.exists()]


def test_a_cold_small_cache_gives_the_same_batches(remote, many_shards, tmp_path, limit):
    wanted = first_batches(open_dataset(many_shards), STEPS, global_batch=32)
    dataset = opened(remote, tmp_path, limit)
    assert held(dataset) == []
    most, done = [0], threading.Event()

    def watch():
        while not done.wait(0.02):
            most[0] = max(most[0], sum(path.stat().st_size for path in held(dataset) if path.exists()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        found = first_batches(dataset, STEPS, global_batch=32, workers=2)
    finally:
        done.set()
        watcher.join()
    assert equal(found, wanted)
    assert 0 < most[0] <= limit < sum(shard.bytes for shard in dataset.reader.shards)
    assert len(fetcher_of(tmp_path)) == 1  # for the test and two workers


def test_a_store_and_a_fetcher_that_die_in_the_middle(s3_server, remote, many_shards, tmp_path, limit):
    wanted = first_batches(open_dataset(many_shards), STEPS, global_batch=32)
    source = Batches(opened(remote, tmp_path, limit), seed=0, global_batch=32, rank=0, world=1, workers=1, start_step=0)
    stream = iter(source)
    found = [next(stream) for _ in range(5)]
    s3_server.kill()
    (fetcher,) = fetcher_of(tmp_path)
    os.kill(fetcher, signal.SIGKILL)

    def back():
        time.sleep(3)
        s3_server.start()
        s3_server.upload(many_shards, "sets", "digits")

    revival = threading.Thread(target=back)
    revival.start()
    found += [next(stream) for _ in range(STEPS - 5)]
    revival.join()
    source.close()
    assert all(torch.equal(a.images, b["images"]) for a, b in zip(found, wanted, strict=True))


@pytest.mark.long
def test_a_run_trains_from_a_store_that_goes_away(s3_server, remote, many_shards, tmp_path, limit):
    """Two ranks, a cold cache smaller than the set, the server killed and started again: the bits of a local run."""
    words = [*SMALL, "train.global_batch=32", f"train.steps={STEPS}", "method=baseline"]
    local = train([*words, f"data.path={many_shards}"], tmp_path / "local")
    cache = ["data.path=", f"data.remote={remote}", f"data.cache={tmp_path / 'cache'}", f"data.cache_limit={limit}"]
    launch = Launch([*words, *cache], tmp_path / "run", **s3_server.environment)
    launch.wait_for_step(5)
    s3_server.kill()
    time.sleep(3)
    s3_server.start()
    s3_server.upload(many_shards, "sets", "digits")
    assert exact(launch.succeed()) == exact(local)
    assert len(fetcher_of(tmp_path)) == 1


@pytest.mark.long
def test_what_is_wrong_in_the_cache_is_fetched_again_and_in_the_store_is_left_out(
    s3_server,
    remote,
    many_shards,
    tmp_path,
):
    wanted = first_batches(open_dataset(many_shards), STEPS, global_batch=32)
    dataset = opened(remote, tmp_path)
    for path in many_shards.glob("*.mds"):
        shutil.copy(path, dataset.path)
    damaged = dataset.path / dataset.reader.shards[5].basename
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    assert equal(first_batches(dataset, STEPS, global_batch=32), wanted)

    client = s3_server.client()
    keys = [f"digits/{dataset.reader.shards[number].basename}" for number in (7, 9)]
    whole = [client.get_object(Bucket="sets", Key=key)["Body"].read() for key in keys]
    try:
        client.put_object(Bucket="sets", Key=keys[0], Body=bytes(data))
        client.delete_object(Bucket="sets", Key=keys[1])
        fresh = opened(remote, tmp_path / "other")
        source = Batches(fresh, seed=0, global_batch=32, rank=0, world=1, workers=0, start_step=0)
        stream = iter(source)
        bad = [sample for _ in range(STEPS) for sample in next(stream).bad]
        reasons = {sample.shard: sample.reason for sample in bad}
        assert sorted(reasons) == sorted(Path(key).name for key in keys)
        assert "bytes instead of" in reasons[Path(keys[0]).name] and "twice" in reasons[Path(keys[0]).name]
        assert "does not exist" in reasons[Path(keys[1]).name]
    finally:
        for key, body in zip(keys, whole, strict=True):
            client.put_object(Bucket="sets", Key=key, Body=body)


def test_wrong_settings_are_one_line(remote, tmp_path):
    with pytest.raises(ConfigError, match=r"needs data\.cache=FOLDER"):
        open_configured(DataConfig(remote=remote))
    with pytest.raises(ConfigError, match=r"data\.cache_limit=1kb is below"):
        opened(remote, tmp_path, "1kb")
    with pytest.raises(UserError, match=r"is not a prepared set: .*does not exist"):
        opened("s3://sets/nothing", tmp_path)
