"""Checkpoints in an object store (a real S3 server): uploaded, read back, restored where the disk was lost."""

import json
import shutil

import pytest
import torch
from launching import SMALL, Launch, exact, train
from s3_server import s3_server  # noqa: F401

from repa_scale.checkpoint import KINDS, MANIFEST, Piece, list_checkpoints, publish, write_manifest, write_pieces
from repa_scale.checkpoint_store import open_store, restore_newest, stored_identity, upload_newest
from repa_scale.cli import main
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.object_store import ObjectStore

BUCKET = "runs"
URL = f"s3://{BUCKET}/deep/xl"
IDENTITY = {"seed": 0, "train.global_batch": 8}


@pytest.fixture
def server(s3_server):  # noqa: F811
    with s3_server.bucket(BUCKET):
        yield s3_server


def save(run, step, seed=0):
    """A whole checkpoint of two ranks."""
    generator = torch.Generator().manual_seed(100 * step + seed)
    temporary = run / "checkpoints" / f"step_{step:08d}.tmp-1"
    temporary.mkdir(parents=True)
    entries = []
    for rank in range(2):
        tensors = {kind: torch.randn(500, generator=generator) for kind in KINDS}
        entries.append(
            write_pieces(temporary, rank, 2, [Piece("model.w", (1000,), 500 * rank, 500 * rank + 500, tensors)])
        )
    hashes = {"identity_hash": "aa", "pair_id": "bb"}
    write_manifest(temporary, entries, {"step": step, "identity": IDENTITY, **hashes, "world_size": 2})
    publish(temporary, run / "checkpoints" / f"step_{step:08d}")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "attempt": 1}) + "\n")


def upload(run):
    with open_store(run, URL, "checkpoint.upload") as store:
        return upload_newest(run, store)


def restore(run, identity=IDENTITY):
    with open_store(run, URL, "checkpoint.upload") as store:
        return restore_newest(run, store, identity)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def overwrite(server, name, data):
    server.client().put_object(Bucket=BUCKET, Key=f"deep/xl/{name}", Body=data)


def test_what_was_uploaded_is_restored_to_the_byte(server, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    assert upload(run) is None
    save(run, 4)
    assert upload(run) == "step_00000004"
    save(run, 8)
    assert main(["checkpoints", str(run), "--upload", URL]) == 0
    assert "has step_00000008, read back and verified" in capsys.readouterr().out
    assert restore(other) == "step_00000008"
    assert contents(other / "checkpoints" / "step_00000008") == contents(run / "checkpoints" / "step_00000008")
    assert (other / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert (other / "checkpoints" / "latest").read_text() == "step_00000008\n"
    assert [path.name for path in (other / "checkpoints").iterdir()] and not list(other.rglob("*.tmp-*"))
    assert not list(run.rglob("*.tmp-*"))
    assert restore(other) is None, "a folder that has a checkpoint is left alone"
    third = tmp_path / "third"
    assert main(["checkpoints", str(third), "--restore", URL, "--verify"]) == 0
    assert "verified" in capsys.readouterr().out


def test_nothing_is_sent_twice(server, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save(run, 4)
    upload(run)
    sent = []
    put = ObjectStore.put
    monkeypatch.setattr(ObjectStore, "put", lambda self, path, name: (sent.append(name), put(self, path, name)))
    upload(run)
    assert sent == ["latest"]


@pytest.mark.long
def test_a_broken_checkpoint_in_the_store_gives_way_to_an_older_one(server, tmp_path):
    run = tmp_path / "run"
    for step in (4, 8, 12):
        save(run, step)
        upload(run)
    overwrite(server, "step_00000012/rank_00001_of_00002.safetensors", b"\0" * 100)
    overwrite(server, "step_00000008/manifest.json", b"{}")
    assert restore(tmp_path / "other") == "step_00000004"
    overwrite(server, "step_00000004/rank_00000_of_00002.safetensors", b"")
    with pytest.raises(UserError, match=r"no checkpoint under checkpoint\.upload=.* is whole"):
        restore(tmp_path / "third")
    assert not list((tmp_path / "third" / "checkpoints").iterdir())


@pytest.mark.long
def test_a_manifest_that_points_outside_is_broken(server, tmp_path):
    """Even one with a right checksum of itself."""
    run = tmp_path / "run"
    save(run, 4)
    upload(run)
    evil = tmp_path / "evil"
    evil.mkdir()
    entry = {"file": "../../../x", "bytes": 1, "checksum": "xxh3-128:00", "pieces": []}
    write_manifest(evil, [entry], {"step": 4, "identity": IDENTITY})
    overwrite(server, "step_00000004/manifest.json", (evil / MANIFEST).read_bytes())
    with pytest.raises(UserError, match="is whole"):
        restore(tmp_path / "deep" / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "evil", "deep"}


def test_an_upload_that_arrives_broken_does_not_count(server, tmp_path, monkeypatch):
    run = tmp_path / "run"
    save(run, 4)
    upload(run)
    save(run, 8)
    put = ObjectStore.put

    def put_torn(self, path, name):
        if name.endswith("rank_00001_of_00002.safetensors"):
            torn = tmp_path / "torn"
            torn.write_bytes(path.read_bytes()[:-4])
            path = torn
        put(self, path, name)

    monkeypatch.setattr(ObjectStore, "put", put_torn)
    with pytest.raises(DataError, match="after its upload"):
        upload(run)
    monkeypatch.undo()
    assert restore(tmp_path / "other") == "step_00000004"


@pytest.mark.long
def test_after_a_rollback_the_older_one_counts(server, tmp_path):
    run = tmp_path / "run"
    for step in (4, 8):
        save(run, step)
        upload(run)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    upload(run)
    assert restore(tmp_path / "other") == "step_00000004"
    save(run, 8, seed=1)  # the same step again, with other weights
    upload(run)
    assert restore(tmp_path / "third") == "step_00000008"
    assert contents(tmp_path / "third/checkpoints/step_00000008") == contents(run / "checkpoints/step_00000008")


def test_another_run_is_refused_with_its_keys(server, tmp_path):
    run = tmp_path / "run"
    save(run, 4)
    upload(run)
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        restore(tmp_path / "other", {**IDENTITY, "seed": 1})
    assert not list((tmp_path / "other" / "checkpoints").iterdir())


def test_a_store_tells_whose_checkpoints_it_has(server, tmp_path):
    """So that a run whose disk is lost keeps the values that it was started with (train.py)."""
    run = tmp_path / "run"
    with open_store(run, URL, "checkpoint.upload") as store:
        assert stored_identity(store) is None
        for step in (4, 8):
            save(run, step)
            upload_newest(run, store)
        overwrite(server, "step_00000008/manifest.json", b"{}")
        assert stored_identity(store) == {"keys": IDENTITY, "identity_hash": "aa", "pair_id": "bb"}


def test_wrong_urls_and_absent_stores_are_one_line(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    save(run, 4)
    for url, words in {
        "ftp://x/y": "is no store that streaming writes to",
        "s3://nowhere/x": "does not answer",
    }.items():
        monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        assert main(["checkpoints", str(run), "--upload", url]) == 64
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1
    assert main(["checkpoints", str(run), "--restore", URL]) == 64
    assert "nothing is fetched into it" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_whose_disk_is_lost_goes_on_from_the_store(server, digits, tmp_path):
    """Killed, its folder deleted, and started again as on another machine: the bits of an undisturbed run. The store is
    away for a while in the middle, and that costs no step."""
    words = [*SMALL, f"data.path={digits}", "train.checkpoint_every=4", "train.steps=20"]
    first = ["optimizer.eps=1e-4"]  # given at the first start alone: the store knows it
    plain = train([*words, *first], tmp_path / "plain", 1, "alone")
    run, url = tmp_path / "run", f"s3://{BUCKET}/run"
    words = [*words, f"checkpoint.upload={url}"]
    server.kill()
    launch = Launch(words, run, 1, "alone", **server.environment)
    assert launch.wait() == 64 and "does not answer" in launch.text(), "a start cannot know whether to go on"
    server.start()
    server.client().create_bucket(Bucket=BUCKET)
    launch = Launch([*words, *first, "train.steps=8"], run, 1, "alone", **server.environment)
    launch.succeed()
    shutil.rmtree(run)
    rows = train(words, run, 1, "alone", **server.environment)
    assert exact(rows) == exact(plain)
    assert [row["attempt"] for row in rows] == [1] * 8 + [2] * 12
    with open_store(run, url, "x") as store:
        assert f"step_00000020/{MANIFEST}" in store.names()
    assert list_checkpoints(run / "checkpoints")[0].name == "step_00000008"
