"""`repa-scale prepare`: real files of every sort in, the same set out, whatever comes between."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from repa_scale.data.batches import decode, open_dataset
from repa_scale.data.crop import center_crop
from repa_scale.data.ingest import _claimed, encode
from repa_scale.data.recipe import Recipe
from repa_scale.data.sources import open_source
from repa_scale.errors import ConfigError, DataError
from repa_scale.prepare import main


def picture(seed, size=(40, 30), mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def tree(tmp_path):
    """Two classes: JPEG, PNG, grey, palette, alpha, CMYK."""
    root = tmp_path / "tree"
    save(picture(0), root / "cat" / "a.jpg", quality=95)
    save(picture(1), root / "cat" / "b.png")
    save(picture(2, mode="L"), root / "cat" / "grey.png")
    save(picture(3, mode="P"), root / "dog" / "palette.png")
    save(picture(4, mode="RGBA"), root / "dog" / "alpha.png")
    save(picture(5, mode="CMYK"), root / "dog" / "cmyk.jpg")
    (root / "dog" / "notes.txt").write_text("no image")
    return root


def prepare(source, out, *more):
    return main([str(source), "--out", str(out), "--size", "16", "--workers", "2", *more])


def test_a_tree_becomes_a_set(tree, tmp_path, capsys):
    out = tmp_path / "set"
    assert prepare(tree, out) == 0
    dataset = open_dataset(out)
    assert (dataset.count, dataset.class_names, dataset.class_counts) == (6, ["cat", "dog"], [3, 3])
    rows = [dataset.reader[i] for i in range(6)]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows), "mixed, by the hash of the name"
    assert {row["name"].split("/")[0]: row["label"] for row in rows} == {"cat": 0, "dog": 1}
    for row in rows:
        wanted = np.asarray(center_crop(Image.open(tree / row["name"]).convert("RGB"), 16))
        assert np.array_equal(decode(row["image"]), wanted), row["name"]
    assert "6 images of 16 px, 2 classes, 0 left out" in capsys.readouterr().out
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > 64
    assert main(["--check", str(out)]) == 0
    before = (out / "dataset.json").stat().st_mtime_ns
    assert prepare(tree, out) == 0
    assert (out / "dataset.json").stat().st_mtime_ns == before, "what is finished is not made again"


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_archives_are_the_same_set(tree, tmp_path, kind):
    prepare(tree, tmp_path / "of_tree")
    archive = tmp_path / f"tree.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in tree.rglob("*.*"):
                file.write(path, f"pictures/{path.relative_to(tree)}")
    else:
        with tarfile.open(archive, "w:gz" if kind.endswith("gz") else "w") as file:
            for path in sorted(tree.rglob("*.*")):
                file.add(path, f"pictures/{path.relative_to(tree)}")
    prepare(archive, tmp_path / "of_archive")
    sets = [open_dataset(tmp_path / name) for name in ("of_tree", "of_archive")]
    rows = [[one.reader[i] for i in range(one.count)] for one in sets]
    if kind == "tar.gz":  # it is read forwards, and keeps its own order
        rows[1].sort(key=lambda row: row["id"])
    else:
        assert sets[0].fingerprint == sets[1].fingerprint
    assert rows[0] == rows[1]


def test_streaming_reads_what_was_written(tree, tmp_path):
    from repa_scale import torchvision_fix

    torchvision_fix.ensure()
    from streaming import StreamingDataset

    prepare(tree, tmp_path / "set", "--format", "jpeg")
    ours = open_dataset(tmp_path / "set").reader
    theirs = StreamingDataset(local=str(tmp_path / "set"), shuffle=False, batch_size=1)
    for i in range(6):
        sample = theirs[i]
        assert (sample["label"], sample["id"], sample["name"]) == tuple(ours[i][k] for k in ("label", "id", "name"))
        assert np.array_equal(np.asarray(sample["image"]), decode(ours[i]["image"]))
    with Image.open(io.BytesIO(ours[0]["image"])) as image:
        assert image.format == "JPEG" and image.layer[1][1:3] == (1, 1), "4:4:4"


def test_flat_folders_are_unlabelled(tmp_path):
    for i in range(3):
        save(picture(i), tmp_path / "flat" / f"{i}.png")
    prepare(tmp_path / "flat", tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    assert dataset.class_names == [] and [dataset.reader[i]["label"] for i in range(3)] == [0, 0, 0]


def test_broken_images_are_left_out_and_listed(tree, tmp_path, capsys, monkeypatch):
    whole = (tree / "cat" / "a.jpg").read_bytes()
    (tree / "cat" / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tree / "dog" / "empty.png").write_bytes(b"")
    (tree / "dog" / "text.png").write_text("this is no picture")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    save(picture(9, size=(120, 100)), tree / "dog" / "bomb.png")
    save(picture(9, size=(240, 100)), tree / "dog" / "large_bomb.png")
    assert prepare(tree, tmp_path / "set") == 0
    dataset = open_dataset(tmp_path / "set")
    reasons = {one["name"]: one["reason"] for one in dataset.manifest["quarantined"]}
    assert dataset.count == 6 and set(reasons) == {
        "cat/truncated.jpg", "dog/bomb.png", "dog/empty.png", "dog/large_bomb.png", "dog/text.png"
    }  # fmt: skip
    assert "bomb" in reasons["dog/bomb.png"] and "bomb" in reasons["dog/large_bomb.png"]
    assert "damaged" in reasons["cat/truncated.jpg"] and "not an image" in reasons["dog/text.png"]
    out = capsys.readouterr().out
    assert "5 left out" in out and "left out cat/truncated.jpg" in out


def test_a_link_to_nothing_and_an_enormous_file_are_listed(tree, tmp_path, monkeypatch):
    monkeypatch.setattr("repa_scale.data.ingest.LARGEST_FILE", 100_000)
    (tree / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tree / "dog" / "zeros.png").write_bytes(bytes(100_001))
    elsewhere = tmp_path / "elsewhere"
    save(picture(7), elsewhere / "owl.png")
    (tree / "owl").symlink_to(elsewhere)
    (tree / "owl" / "back").symlink_to(tree)
    assert prepare(tree, tmp_path / "set") == 0
    dataset = open_dataset(tmp_path / "set")
    reasons = {one["name"]: one["reason"] for one in dataset.manifest["quarantined"]}
    assert set(reasons) == {"cat/gone.jpg", "dog/zeros.png"}
    assert "100001 bytes" in reasons["dog/zeros.png"] and "cannot be read" in reasons["cat/gone.jpg"]
    assert dataset.class_names == ["cat", "dog", "owl"] and dataset.class_counts == [3, 3, 1]


def test_names_of_an_archive_are_only_names(tmp_path, capsys):
    buffer = io.BytesIO()
    picture(0).save(buffer, format="PNG")
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name in ("../cat/up.png", "/cat/root.png", "all/cat/a.png", "all/dog/b.png", "all/dog/caf\udce9.png"):
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    assert prepare(tmp_path / "evil.tar", tmp_path / "set") == 0
    dataset = open_dataset(tmp_path / "set")
    assert sorted(dataset.reader[i]["name"] for i in range(3)) == ["cat/a.png", "dog/b.png", "dog/caf\\xe9.png"]
    assert "passed over 2 files" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path)) == ["evil.tar", "set"]


def test_a_limit_keeps_all_classes(tmp_path):
    for words, count in ((["--limit", "50"], 50), (["--limit", "5000"], 1797)):
        out = tmp_path / str(count)
        assert main(["digits", "--out", str(out), "--size", "8", *words]) == 0
        dataset = open_dataset(out)
        assert dataset.count == count and min(dataset.class_counts) * 13 >= count
    with pytest.raises(DataError, match="other images"):
        main(["digits", "--out", str(tmp_path / "50"), "--size", "8", "--limit", "51"])


def test_one_prepare_at_a_time(tree, tmp_path):
    source, recipe = open_source(str(tree)), Recipe(16, quality=0)
    job = {"source": source.fingerprint, "recipe": recipe.as_dict()}
    with _claimed(tmp_path / "set", job), pytest.raises(DataError, match="another prepare"):
        prepare(tree, tmp_path / "set")
    assert prepare(tree, tmp_path / "set") == 0


def test_a_picture_brings_nothing_but_its_pixels():
    plain, dressed = io.BytesIO(), io.BytesIO()
    picture(0).save(plain, format="PNG")
    picture(0).save(dressed, format="PNG", icc_profile=b"profile" * 50, dpi=(72, 72), transparency=(1, 2, 3))
    for kind in ("png", "jpeg"):
        recipe = Recipe(16, kind)
        assert encode(plain.getvalue(), recipe) == encode(dressed.getvalue(), recipe)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_sample_is_the_public_crop(golden_folder, size):
    path = golden_folder / "preprocess.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    numbers = load_file(path)
    buffer = io.BytesIO()
    Image.fromarray(numbers["picture"]).save(buffer, format="PNG")
    assert np.array_equal(decode(encode(buffer.getvalue(), Recipe(size)).data), numbers[f"adm_center_crop_{size}"])


def test_sixteen_bit_grey_keeps_its_upper_byte():
    values = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    assert np.array_equal(decode(encode(buffer.getvalue(), Recipe(16)).data)[..., 0].flatten(), np.arange(256))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "holds no images"),
        (lambda root: root.write_bytes(b"PK but no archive"), "is none of a folder"),
        (
            lambda root: save(picture(0), root / "a.png") or save(picture(1), root / "cat" / "b.png"),
            "beside class folders",
        ),
        (lambda root: (root / "cat").mkdir(parents=True) or (root / "cat" / "a.png").write_text("x"), "not one image"),
    ],
)
def test_sources_that_cannot_be_prepared(tmp_path, make, message):
    make(tmp_path / "source")
    with pytest.raises(DataError, match=message) as error:
        prepare(tmp_path / "source", tmp_path / "set")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_wrong_words(tree, tmp_path):
    for words, message in (
        ([str(tree), "--out", str(tmp_path / "a"), "--size", "2"], "between 4 and 4096"),
        ([str(tree), "--out", str(tmp_path / "a"), "--size", "16", "--quality", "50"], "between 95 and 100"),
        ([str(tree), "--size", "16"], "are needed"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(words)


def test_a_folder_of_something_else_is_not_touched(tree, tmp_path):
    out = tmp_path / "set"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        prepare(tree, out)
    assert sorted(os.listdir(out)) == ["thesis.tex"]
    prepare(tree, tmp_path / "other")
    with pytest.raises(DataError, match="another recipe"):
        prepare(tree, tmp_path / "other", "--format", "jpeg")


def children(pid):
    """Their folders in /proc."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [f"/proc/{child}" for child in file.read().split()]


def test_a_killed_prepare_goes_on(tmp_path, monkeypatch):
    root = tmp_path / "tree"
    for i in range(5000):
        save(picture(i % 50, size=(20, 20)), root / f"class{i % 3}" / f"{i}.png", compress_level=0)
    command = [sys.executable, "-m", "repa_scale", "prepare", str(root), "--size", "16", "--workers", "2", "--out"]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / ".prepare" / "part_00000" / "done.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = children(process.pid)
    process.kill()  # alone: its workers must find out by themselves
    process.wait()
    while any(map(os.path.exists, workers)):
        assert time.monotonic() < deadline, "a decoding process goes on without its parent"
        time.sleep(0.1)
    with pytest.raises(DataError, match="is unfinished"):
        open_dataset(killed)
    first = killed / ".prepare" / "part_00000" / "shard.00000.mds"
    written = first.stat().st_mtime_ns
    subprocess.run([*command, str(killed)], check=True, stdout=subprocess.DEVNULL)
    assert (killed / "shard.00000.mds").stat().st_mtime_ns == written, "finished parts are kept"
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    assert open_dataset(killed).fingerprint == open_dataset(tmp_path / "whole").fingerprint
    assert open_dataset(killed).count == 5000 and not (killed / ".prepare").exists()


def test_a_full_disk_is_one_line(tree, tmp_path):
    for i in range(400):
        save(picture(i, size=(200, 200)), tree / "cat" / f"{i}.png", compress_level=0)
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small]).returncode:
        pytest.skip("cannot mount a small tmpfs here")
    try:
        words = [str(tree), "--out", str(small / "set"), "--size", "128"]
        done = subprocess.run([sys.executable, "-m", "repa_scale", "prepare", *words], capture_output=True, text=True)
        assert done.returncode == 64 and "No space left" in done.stderr and "Traceback" not in done.stderr
    finally:
        subprocess.run(["umount", small], check=True)


def test_damage_is_found(tree, tmp_path, capsys):
    out = tmp_path / "set"
    prepare(tree, out)
    shard = out / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"2 problems"):
        main(["--check", str(out)])
    assert "sha256 is not the one" in capsys.readouterr().out
    index = json.loads((out / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../etc/passwd"
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not a plain file name"):
        open_dataset(out)


def test_cifar10_from_its_zip(data_folder, tmp_path):
    """The first 60 images of each class of the real archive."""
    with zipfile.ZipFile(data_folder / "cifar10_train.zip") as archive:
        names = [name for name in sorted(archive.namelist()) if name.endswith((".jpg", ".jpeg", ".png", ".JPEG"))]
        chosen = [name for i, name in enumerate(names) if i % 5000 < 60]
        with zipfile.ZipFile(tmp_path / "some.zip", "w") as some:
            for name in chosen:
                some.writestr(name, archive.read(name))
    main([str(tmp_path / "some.zip"), "--out", str(tmp_path / "set"), "--size", "32"])
    dataset = open_dataset(tmp_path / "set")
    assert len(dataset.class_names) == 10 and dataset.class_counts == [60] * 10
