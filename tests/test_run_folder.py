"""The run folder, the checkpoint format and the trained weights read back, without DeepSpeed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from repa_scale.checkpoint import (
    REASON,
    CheckpointReader,
    Piece,
    list_checkpoints,
    publish,
    quarantine,
    write_manifest,
    write_pieces,
)
from repa_scale.config import CheckpointConfig
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.retention import prune
from repa_scale.run_folder import open_run, read_metrics, read_status, require_disk_space

KEYS = {"keys": {"seed": 0, "model.name": "SiT-XL/2"}, "identity_hash": "aa", "pair_id": "bb"}


def opened(path, keys=KEYS, resume="auto"):
    return open_run(path, keys, "seed: 0\n", resume)


def test_status_and_attempts(tmp_path):
    run = opened(tmp_path / "run")
    run.start()
    run.progress(7)
    status = read_status(tmp_path / "run")
    assert (status["state"], status["attempt"]) == ("running", 1) and time.time() - status["updated"] < 5
    run.record({"step": 1, "attempt": 1, "loss": float("nan")})
    run.close("preempted", 7)
    assert read_status(tmp_path / "run")["state"] == "preempted"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == {"step": 1, "attempt": 1, "loss": "nan"}
    again = opened(tmp_path / "run")
    assert again.attempt == 2
    again.close("completed", 8)


def test_the_row_that_counts(tmp_path):
    lines = [{"step": 1, "attempt": 1, "x": 1}, {"step": 2, "attempt": 1, "x": 2}, {"step": 2, "attempt": 2, "x": 3}]
    lines += [{"step": 2, "attempt": 1, "x": 4}, {"step": 1, "attempt": 1, "x": 5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "att')
    assert [row["x"] for row in read_metrics(tmp_path)] == [5, 3]


def test_a_row_that_a_kill_cut_off_does_not_spoil_the_next_one(tmp_path):
    run = opened(tmp_path / "run")
    run.record({"step": 1, "attempt": 1, "loss": 1.0})
    run.close("failed", 1)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "att')
    again = opened(tmp_path / "run")
    again.record({"step": 2, "attempt": 2, "loss": 2.0})
    again.close("completed", 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["attempt"]) for line in lines] == [(1, 1), (2, 2)]


def test_another_identity_is_refused_with_its_keys(tmp_path):
    opened(tmp_path / "run").close("completed", 1)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    with pytest.raises(ConfigError, match=r'model\.name: "SiT-XL/2" -> "SiT-B/2"'):
        opened(tmp_path / "run", {**KEYS, "keys": {"seed": 0, "model.name": "SiT-B/2"}})
    assert before == sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())


def test_a_live_holder_is_respected_and_a_dead_one_is_not(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from repa_scale.run_folder import open_run\n"
        f"open_run(Path(sys.argv[1]), {KEYS!r}, 'seed: 0', 'auto'); print('open', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        with pytest.raises(UserError, match=f"process {holder.pid} on"):
            opened(tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()
    opened(tmp_path / "run").close("completed", 1)
    (tmp_path / "run" / "lease.json").write_text('{"host": "torn')
    opened(tmp_path / "run").close("completed", 1)


def test_a_disk_without_room_is_refused_before_training(tmp_path):
    require_disk_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(UserError, match=r"a checkpoint takes 1e\+09 GB"):
        require_disk_space(tmp_path, 10**18)


def written(folder, step=3, cut=5):
    """A checkpoint of one 3 x 4 parameter, cut between two ranks."""
    torch.manual_seed(step)
    whole = {kind: torch.randn(12) for kind in ("master", "exp_avg", "exp_avg_sq", "ema")}
    temporary = folder / f"step_{step:08d}.tmp-1"
    temporary.mkdir(parents=True)
    entries = []
    for rank, (start, stop) in enumerate(((0, cut), (cut, 12))):
        tensors = {kind: value[start:stop] for kind, value in whole.items()}
        entries.append(write_pieces(temporary, rank, 2, [Piece("model.w", (3, 4), start, stop, tensors)]))
    write_manifest(temporary, entries, {"step": step, "samples": 8, "scalars": {}})
    final = folder / f"step_{step:08d}"
    publish(temporary, final)
    return final, whole


def test_any_range_can_be_read_from_any_number_of_ranks(tmp_path):
    folder, whole = written(tmp_path)
    reader = CheckpointReader(folder)
    reader.verify()
    assert (reader.step, list(reader.names), reader.shape("model.w")) == (3, ["model.w"], (3, 4))
    for start, stop in ((0, 12), (0, 5), (5, 12), (3, 9), (11, 12)):
        assert torch.equal(reader.read("exp_avg", "model.w", start, stop), whole["exp_avg"][start:stop])
    assert torch.equal(reader.tensor("ema", "model.w"), whole["ema"].view(3, 4))
    assert (tmp_path / "latest").read_text().strip() == folder.name


def test_damage_of_a_checkpoint_is_named(tmp_path):
    folder, _ = written(tmp_path)
    file = next(folder.glob("rank_00001*"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match="does not have the checksum"):
        CheckpointReader(folder).verify()
    file.write_bytes(data[:-1])
    with pytest.raises(DataError, match="bytes instead of"):
        CheckpointReader(folder).verify()
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        CheckpointReader(folder).verify()


def test_what_was_not_finished_is_no_checkpoint(tmp_path):
    folder, _ = written(tmp_path)
    (tmp_path / "step_00000009.tmp-2").mkdir()
    (tmp_path / "step_00000007").mkdir()
    os.rename(folder / "manifest.json", folder / "manifest.away")
    assert list_checkpoints(tmp_path) == []
    os.rename(folder / "manifest.away", folder / "manifest.json")
    assert list_checkpoints(tmp_path) == [folder]


def test_a_checkpoint_of_format_1_loads_for_ever():
    reader = CheckpointReader(Path(__file__).parent / "checkpoint_v1" / "step_00000003")
    reader.verify()
    assert reader.manifest["format_version"] == 1 and reader.manifest["scalars"]["optimizer_steps"] == 3
    assert torch.equal(reader.tensor("ema", "model.w"), 300 + torch.arange(12.0).view(3, 4))


def test_a_changed_byte_anywhere_is_found(tmp_path):
    """Of every file of a checkpoint, manifest and headers included, at every place."""
    folder, _ = written(tmp_path)
    for file in folder.iterdir():
        data = file.read_bytes()
        for place in range(len(data)):
            file.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            with pytest.raises(DataError):
                CheckpointReader(folder).verify()
        file.write_bytes(data)
    CheckpointReader(folder).verify()


def test_what_is_written_is_plain_safetensors(tmp_path):
    from safetensors.torch import load_file

    folder, whole = written(tmp_path)
    parts = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    for kind, value in whole.items():
        assert torch.equal(torch.cat([part[f"{kind}/model.w"] for part in parts]), value)


def test_a_checkpoint_set_aside_keeps_its_reason(tmp_path):
    for _ in range(2):
        folder, _ = written(tmp_path)
        moved = quarantine(folder, "broken")
        assert not folder.exists() and json.loads((moved / REASON).read_text())["reason"] == "broken"
    assert [path.name for path in sorted((tmp_path / "quarantine").iterdir())] == ["step_00000003", "step_00000003-2"]
    assert list_checkpoints(tmp_path) == []


def test_which_checkpoints_stay(tmp_path):
    for step in range(1, 9):
        written(tmp_path, step)
    names = [f"step_{step:08d}" for step in range(1, 9)]
    policy = CheckpointConfig(keep_last=2, keep_every=3)
    assert prune(tmp_path, CheckpointConfig(), names) == [] and prune(tmp_path, policy, ["step_00000001"]) == []
    assert prune(tmp_path, policy, names, coming=1) == [names[i] for i in (0, 1, 3, 4, 6)]
    assert [path.name for path in list_checkpoints(tmp_path)] == [names[i] for i in (2, 5, 7)]
    assert prune(tmp_path, CheckpointConfig(keep_last=1), [names[7]], coming=1) == [names[2], names[5]]
    assert prune(tmp_path, CheckpointConfig(keep_last=1), [names[7]], coming=1) == [], "the only verified one stays"
