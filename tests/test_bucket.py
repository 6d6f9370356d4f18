"""A set prepared into an object store: the same set, resumable, also from another machine."""

import json
import os
import signal
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image
from s3_server import s3_server  # noqa: F401

from repa_scale.data.batches import open_dataset
from repa_scale.data.bucket import Bucket
from repa_scale.data.recipe import Recipe
from repa_scale.errors import DataError, UserError
from repa_scale.prepare import main

BUCKET = "sets"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    generator = np.random.default_rng(0)
    for i in range(100):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "ab"[i % 2] / f"{i:03d}.png")
    (root / "a" / "000.png").write_bytes(b"broken")
    return root


@pytest.fixture
def bucket(s3_server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Recipe, "part_items", 20)
    with s3_server.bucket(BUCKET):
        yield s3_server


def prepare(source, url, scratch, *more):
    words = [str(source), "--out", url, "--size", "16", "--workers", "1", "--scratch", str(scratch), *more]
    return main(words)


def test_a_set_in_a_bucket_is_the_set_in_a_folder(source, bucket, tmp_path, capsys):
    """Interrupted by SIGKILL, gone on from another machine, finished; then nothing is left to do."""
    url = f"s3://{BUCKET}/deep/set"
    assert main([str(source), "--out", str(tmp_path / "local"), "--size", "16", "--workers", "1"]) == 0

    def killed_behind_two_parts():
        put = Bucket.put_part

        def put_or_die(self, number, folder, done):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return put(self, number, folder, done)

        Bucket.put_part = put_or_die
        prepare(source, url, tmp_path / "first")

    process = get_context("fork").Process(target=killed_behind_two_parts)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    partial = bucket.download(BUCKET, "deep/set", tmp_path / "partial")
    assert "dataset.json" not in partial and "index.json" not in partial
    assert sorted(n for n in partial if n.endswith(".mds")) == ["shard.00000.000.mds", "shard.00001.000.mds"]
    with pytest.raises(DataError, match="holds the beginning of another preparation"):
        prepare(source, url, tmp_path / "second", "--format", "jpeg")
    before = {entry["Key"]: entry["LastModified"] for entry in _objects(bucket)}
    assert prepare(source, url, tmp_path / "second") == 0
    after = {entry["Key"]: entry["LastModified"] for entry in _objects(bucket)}
    assert all(after[key] == before[key] for key in before), "what was uploaded is not uploaded again"
    assert not list((tmp_path / "second").iterdir()), "nothing stays behind locally"
    names = bucket.download(BUCKET, "deep/set", tmp_path / "fetched")
    assert after["deep/set/dataset.json"] == max(after.values()), "the manifest comes last"
    assert sum(name.endswith(".mds") for name in names) == 5
    local, fetched = open_dataset(tmp_path / "local"), open_dataset(tmp_path / "fetched")
    fetched.verify()
    assert fetched.fingerprint == local.fingerprint and fetched.count == 99
    assert [fetched.reader[i] for i in range(99)] == [local.reader[i] for i in range(99)]
    assert fetched.manifest["quarantined"] == local.manifest["quarantined"]
    capsys.readouterr()
    assert prepare(source, url, tmp_path / "third") == 0
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(DataError, match="other images or another recipe"):
        prepare(source, url, tmp_path / "third", "--format", "jpeg")


def _objects(server):
    return server.client().list_objects_v2(Bucket=BUCKET)["Contents"]


def test_streaming_reads_the_bucket(source, bucket, tmp_path):
    url = f"s3://{BUCKET}/plain"
    assert prepare(source, url, tmp_path / "scratch") == 0
    from streaming import StreamingDataset

    theirs = StreamingDataset(remote=url, local=str(tmp_path / "cache"), shuffle=False, batch_size=1)
    assert {theirs[i]["name"] for i in range(99)} == {f"{'ab'[i % 2]}/{i:03}.png" for i in range(1, 100)}


def test_a_bucket_with_something_else_or_none_at_all(source, bucket, tmp_path):
    bucket.client().put_object(Bucket=BUCKET, Key="thesis/chapter1.tex", Body=b"years of work")
    with pytest.raises(DataError, match="is not empty"):
        prepare(source, f"s3://{BUCKET}/thesis", tmp_path)
    with pytest.raises(UserError, match="does not answer as it should") as error:
        prepare(source, "s3://no-such-bucket/set", tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"ftp:// is no store that streaming writes to; known: .*s3"):
        prepare(source, "ftp://host/set", tmp_path)
    assert [entry["Key"] for entry in _objects(bucket)] == ["thesis/chapter1.tex"]


def test_a_store_that_goes_away_is_one_line_and_the_same_command_goes_on(source, bucket, tmp_path, monkeypatch):
    """The server is killed after the first part, and comes back empty: a set whose parts are gone is begun anew."""
    monkeypatch.setattr("repa_scale.object_store.RETRIES", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    put = Bucket.put_part

    def put_and_lose_the_server(self, number, folder, done):
        done = put(self, number, folder, done)
        bucket.kill()
        return done

    with monkeypatch.context() as patch, pytest.raises(UserError, match="does not answer as it should") as error:
        patch.setattr(Bucket, "put_part", put_and_lose_the_server)
        prepare(source, f"s3://{BUCKET}/set", tmp_path)
    assert "\n" not in str(error.value)
    bucket.start()
    bucket.client().create_bucket(Bucket=BUCKET)
    assert prepare(source, f"s3://{BUCKET}/set", tmp_path) == 0
    bucket.download(BUCKET, "set", tmp_path / "fetched")
    assert open_dataset(tmp_path / "fetched").count == 99
    assert json.loads((tmp_path / "fetched" / "dataset.json").read_text())["class_counts"] == [49, 50]
