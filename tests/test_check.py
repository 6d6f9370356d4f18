"""`prepare --check`: every sort of damage is told, all of it, with exit code 64."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from repa_scale.cli import main as cli
from repa_scale.data.check import balance
from repa_scale.data.recipe import Recipe
from repa_scale.prepare import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """12 pictures of 2 classes in three shards."""
    folder = tmp_path_factory.mktemp("checked")
    generator = np.random.default_rng(0)
    for i in range(12):
        (folder / "source" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "source" / "ab"[i % 2] / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "part_items", 4)
        assert main([str(folder / "source"), "--out", str(folder / "set"), "--size", "16", "--workers", "1"]) == 0
    assert len(list((folder / "set").glob("*.mds"))) == 3
    return folder / "set"


def flip_a_byte(folder):
    data = bytearray((folder / "shard.00001.mds").read_bytes())
    data[-20] ^= 1
    (folder / "shard.00001.mds").write_bytes(data)


def delete_a_shard(folder):
    (folder / "shard.00002.mds").unlink()


def cut_a_shard(folder):
    data = (folder / "shard.00000.mds").read_bytes()
    (folder / "shard.00000.mds").write_bytes(data[: len(data) // 2])


def name_another_place(folder):
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../x"
    (folder / "index.json").write_text(json.dumps(index))


def change_the_index(folder):
    (folder / "index.json").write_text((folder / "index.json").read_text() + " ")


def lose_a_sample_from_the_manifest(folder):
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["class_counts"] = [5, 7]
    (folder / "dataset.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte, "shard.00001.mds is damaged: its sha256 is not the one"),
        (delete_a_shard, "shard.00002.mds cannot be read (No such file"),
        (cut_a_shard, "shard.00000.mds has"),
        (name_another_place, "'../../x' is not a plain file name"),
        (change_the_index, "is not the index that dataset.json was made with"),
        (lose_a_sample_from_the_manifest, "class a has 6 samples, dataset.json says 5"),
    ],
)
def test_each_damage_is_told(whole, tmp_path, capsys, damage, words):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    damage(folder)
    assert cli(["prepare", "--check", str(folder)]) == 64
    captured = capsys.readouterr()
    assert words in captured.out + captured.err and "Traceback" not in captured.err
    assert captured.err.count("\n") == 1


def test_all_damages_are_listed_and_a_sample_is_quicker(whole, tmp_path, capsys):
    folder = tmp_path / "set"
    shutil.copytree(whole, folder)
    flip_a_byte(folder)
    delete_a_shard(folder)
    cut_a_shard(folder)
    for more in ([], ["--sample", "3"]):
        assert cli(["prepare", "--check", str(folder), *more]) == 64
        captured = capsys.readouterr()
        assert all(f"shard.0000{i}.mds" in captured.out for i in range(3)) and "problems" in captured.err
    assert cli(["prepare", "--check", str(whole), "--sample", "3"]) == 0
    out = capsys.readouterr().out
    assert "whole: 12 images of 16 px" in out and "(3 of them read)" in out and "2 classes of 6 samples each" in out
    assert cli(["prepare", "--check", str(whole), "--sample", "0"]) == 64


def test_the_balance_of_classes():
    assert balance([3, 0, 9], ["a", "b", "c"]) == "3 classes of 0 (b) to 9 (c) samples, 4.0 on average; 1 are empty"
    assert balance([], []) == "no classes"
