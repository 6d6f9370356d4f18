"""The same bytes for any number of workers and processes, and after any number of kills.

With REPA_SCALE_FULL=1 the kills go through the command line on 5,000 images of CIFAR-10.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image

from repa_scale.data.batches import open_dataset
from repa_scale.data.recipe import Recipe
from repa_scale.errors import DataError
from repa_scale.prepare import main

FULL = os.environ.get("REPA_SCALE_FULL") == "1"
KILLS = 5


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """1,200 small pictures of 3 classes, two of them broken."""
    root = tmp_path_factory.mktemp("pictures") / "source"
    generator = np.random.default_rng(0)
    for i in range(1200):
        path = root / f"class{i % 3}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(path, compress_level=0)
    for i in (7, 900):
        path = root / f"class{i % 3}" / f"{i:04d}.png"
        path.write_bytes(path.read_bytes()[:300])
    return root


def run(source, out, workers, *more):
    return main([str(source), "--out", str(out), "--size", "16", "--workers", str(workers), *more])


def index_hash(folder):
    return hashlib.sha256((folder / "index.json").read_bytes()).hexdigest()


def parts_done(out):
    return len(list(out.glob(".prepare/part_*/done.json")))


def kill_after(out, start, parts, delay):
    """Starts a preparation and kills it by SIGKILL once `parts` are done and `delay` seconds have gone."""
    process = start()
    deadline = time.monotonic() + 120
    while parts_done(out) < parts and process.is_alive():
        assert time.monotonic() < deadline, "the preparation does not get on"
        time.sleep(0.002)
    time.sleep(delay)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    return was_alive


def test_five_kills_change_no_byte(pictures, tmp_path, monkeypatch):
    """Parts of 60 pictures; the kills come at random moments of a growing set."""
    monkeypatch.setattr(Recipe, "part_items", 60)
    run(pictures, tmp_path / "whole", 1)
    out, chance = tmp_path / "killed", random.Random(0)

    def start():
        process = get_context("fork").Process(target=run, args=(pictures, out, 2))
        process.start()
        return process

    wholes = [kill_after(out, start, 3 * i, chance.uniform(0, 0.05)) for i in range(KILLS)]
    assert all(wholes), "each was killed while it worked"
    with pytest.raises(DataError, match="is unfinished"):
        open_dataset(out)
    done = {int(path.parent.name[-5:]) for path in out.glob(".prepare/part_*/done.json")}
    shards = {part: out / ".prepare" / f"part_{part:05d}" / "shard.00000.mds" for part in done}
    torn = min(done)
    shards[torn].write_bytes(shards[torn].read_bytes()[:-100])  # what a power cut may leave behind a finished file
    before = {part: path.stat().st_mtime_ns for part, path in shards.items()}
    assert run(pictures, out, 3) == 0
    assert index_hash(out) == index_hash(tmp_path / "whole")
    made = {part for part in done if (out / f"shard.{part:05d}.mds").stat().st_mtime_ns != before[part]}
    assert made == {torn}, "finished parts are kept, torn ones made again"
    dataset = open_dataset(out)
    ids = [dataset.reader[i]["id"] for i in range(dataset.count)]
    assert dataset.count == len(set(ids)) == 1198
    assert sorted(one["name"] for one in dataset.manifest["quarantined"]) == ["class0/0900.png", "class1/0007.png"]
    whole = json.loads((tmp_path / "whole" / "dataset.json").read_text())
    assert dataset.manifest == whole


@pytest.fixture(scope="module")
def cifar5000(data_folder, tmp_path_factory):
    """A tenth of the CIFAR-10 training images, evenly."""
    path = tmp_path_factory.mktemp("cifar") / "cifar5000.zip"
    with zipfile.ZipFile(data_folder / "cifar10_train.zip") as archive, zipfile.ZipFile(path, "w") as some:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for name in names[::10]:
            some.writestr(name, archive.read(name))
    return path


@pytest.mark.timeout(1800)
@pytest.mark.skipif(not FULL, reason="minutes: REPA_SCALE_FULL=1")
def test_five_kills_of_the_command(cifar5000, tmp_path):
    """5,000 images, 2 workers, five kills of all processes at random times."""
    command = [sys.executable, "-m", "repa_scale", "prepare", str(cifar5000), "--size", "256", "--out"]
    began = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole"), "--workers", "1"], check=True)
    seconds = time.monotonic() - began
    out, deaths = tmp_path / "killed", []
    while len(deaths) < KILLS:
        process = subprocess.Popen([*command, str(out), "--workers", "2"], start_new_session=True)
        time.sleep(random.uniform(0.05, 0.15) * seconds)
        assert process.poll() is None, "it was killed while it worked"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        deaths.append(parts_done(out))
    subprocess.run([*command, str(out), "--workers", "2"], check=True)
    print("parts done at each death:", deaths, "index:", index_hash(out), index_hash(tmp_path / "whole"))
    assert index_hash(out) == index_hash(tmp_path / "whole")
    dataset = open_dataset(out)
    assert len({dataset.reader[i]["id"] for i in range(dataset.count)}) == dataset.count == 5000


def test_shards_are_mixed(tmp_path):
    """The images of a class folder do not lie together, whatever the workers."""
    from repa_scale.data import ingest as room

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "SHARD_BYTES", 15_000)
        assert main(["digits", "--out", str(tmp_path / "set"), "--size", "8", "--workers", "1"]) == 0
    dataset = open_dataset(tmp_path / "set")
    first = [dataset.reader[number]["label"] for number in range(dataset.reader.shards[0].samples)]
    assert len(set(first)) == 10
