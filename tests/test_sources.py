"""Sources of every kind, made as real files: what is read, how it is labelled, and what hostile ones cannot do."""

import hashlib
import io
import json
import os
import struct
import subprocess
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from repa_scale.data.batches import decode, open_dataset
from repa_scale.data.labels import Labels, parse_labels, read_map
from repa_scale.data.sources import open_source
from repa_scale.errors import DataError
from repa_scale.prepare import main


def picture(seed, size=(20, 24), kind="PNG"):
    """The bytes of a file."""
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format=kind)
    return buffer.getvalue()


PICTURES = [picture(i) for i in range(6)]


def tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def parquet(path, rows, labels=None, paths=None, names=None, **options):
    """As the hub writes it: a struct of bytes and path, labels, and the classes' names in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [{"bytes": row, "path": paths[i] if paths else None} for i, row in enumerate(rows)]
    columns, fields = [pa.array(values, kind)], [pa.field("image", kind)]
    features = {"image": {"_type": "Image"}}
    if labels is not None:
        columns.append(pa.array(labels))
        fields.append(pa.field("label", columns[-1].type))
        features["label"] = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata)), path, **options)
    return path


def prepared(source, out, *more):
    sources = source if isinstance(source, list) else [source]
    assert main([*map(str, sources), "--out", str(out), "--size", "16", "--workers", "1", *more]) == 0
    dataset = open_dataset(out)
    return dataset, sorted((dataset.reader[i] for i in range(dataset.count)), key=lambda row: row["name"])


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_webdataset_tars(tmp_path):
    for shard in range(2):
        members = []
        for i in range(3):
            members += [(f"{i:06d}.png", PICTURES[3 * shard + i]), (f"{i:06d}.cls", f"{i}\n".encode())]
        tar(tmp_path / f"train-{shard:04d}.tar", [*members, ("readme.txt", b"")])
    dataset, rows = prepared([tmp_path / "train-0000.tar", tmp_path / "train-0001.tar"], tmp_path / "set")
    assert [row["label"] for row in rows] == [0, 1, 2] * 2 and dataset.class_names == ["0", "1", "2"]
    assert [row["name"] for row in rows][::3] == ["train-0000/000000.png", "train-0001/000000.png"]
    (tmp_path / "tars").mkdir()
    for path in tmp_path.glob("*.tar"):
        path.rename(tmp_path / "tars" / path.name)
    folder, _ = prepared(tmp_path / "tars", tmp_path / "set2")
    assert folder.fingerprint == dataset.fingerprint, "a folder of tars is the tars"


def test_webdataset_with_json(tmp_path):
    members = []
    for i, name in enumerate(("tench", "goldfish", "tench")):
        fields = {"class_name": name, "width": 20, "label": i % 2}
        members += [(f"a/{i}.jpg", picture(i, kind="JPEG")), (f"a/{i}.json", json.dumps(fields).encode())]
    tar(tmp_path / "some.tar", members)
    assert open_source(str(tmp_path / "some.tar")).class_names == ["0", "1"]
    source = open_source(str(tmp_path / "some.tar"), Labels(column="class_name"))
    assert source.class_names == ["goldfish", "tench"] and [item.label for item in source.items] == [1, 0, 1]


def test_parquet_as_the_hub_keeps_it(tmp_path):
    data = tmp_path / "imagenet" / "data"
    names = ["tench", "goldfish", "shark"]
    for i in range(2):
        rows = slice(3 * i, 3 * i + 3)
        parquet(data / f"train-0000{i}-of-00002.parquet", PICTURES[rows], [2, 0, 0], names=names, row_group_size=2)
    dataset, rows = prepared(tmp_path / "imagenet", tmp_path / "set")
    assert dataset.class_names == names and dataset.class_counts == [4, 0, 2] and dataset.name == "imagenet"
    for row, data_of in zip(rows, PICTURES, strict=True):
        full = np.asarray(Image.open(io.BytesIO(data_of)).convert("RGB"))
        assert decode(row["image"]).shape == (16, 16, 3) and abs(decode(row["image"]).mean() - full.mean()) < 20
    limited, some = prepared(tmp_path / "imagenet", tmp_path / "some", "--limit", "3")
    assert [row["name"] for row in some] == [rows[i]["name"] for i in (0, 2, 4)]
    assert [row["image"] for row in some] == [rows[i]["image"] for i in (0, 2, 4)]
    assert limited.fingerprint != dataset.fingerprint
    parquet(data / "validation-00000-of-00001.parquet", PICTURES[:1], [0])
    with pytest.raises(DataError, match=r"the splits train, validation; give the files of one"):
        open_source(str(tmp_path / "imagenet"))


def test_parquet_names_text_labels_and_test_splits(tmp_path):
    file = parquet(tmp_path / "a.parquet", PICTURES[:3], ["owl", "cat", "owl"], ["x/1.png", "x/2.png", "x/3.png"])
    source = open_source(str(file))
    assert [item.name for item in source.items] == ["x/1.png", "x/2.png", "x/3.png"]
    assert source.class_names == ["cat", "owl"] and [item.label for item in source.items] == [1, 0, 1]
    assert open_source(str(file), parse_labels("none", None)).class_names == []
    test = parquet(tmp_path / "t.parquet", PICTURES[:2], [-1, -1])
    assert open_source(str(test)).class_names == [], "the hub marks what has no label by -1"
    with pytest.raises(DataError, match="has no column fine_label"):
        open_source(str(test), Labels(column="fine_label"))


def test_an_mds_set_is_a_source(tmp_path):
    for i, data in enumerate(PICTURES):
        (tmp_path / "tree" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / "ab"[i % 2] / f"{i}.png").write_bytes(data)
    first, rows = prepared(tmp_path / "tree", tmp_path / "first")
    second, again = prepared(tmp_path / "first", tmp_path / "second")
    assert [(r["id"], r["label"], r["image"]) for r in again] == [(r["id"], r["label"], r["image"]) for r in rows]
    assert second.fingerprint == first.fingerprint and second.class_names == ["a", "b"]


def test_a_foreign_mds_set(tmp_path):
    from repa_scale import torchvision_fix

    torchvision_fix.ensure()
    from streaming import MDSWriter

    with MDSWriter(out=str(tmp_path / "theirs"), columns={"image": "bytes", "class": "int", "note": "str"}) as writer:
        for i, data in enumerate(PICTURES):
            writer.write({"image": data, "class": i % 3, "note": "x"})
    dataset, rows = prepared(tmp_path / "theirs", tmp_path / "set")
    assert dataset.class_names == ["0", "1", "2"] and [row["label"] for row in rows] == [0, 1, 2] * 2


def test_several_archives_are_one_set_and_flat_ones_are_classes(tmp_path):
    (tmp_path / "outer").mkdir()
    for number, name in enumerate(("n01", "n02")):
        members = [(f"{name}_{i}.png", PICTURES[3 * number + i]) for i in range(3)]
        tar(tmp_path / "outer" / f"{name}.tar", members)
    dataset, rows = prepared(tmp_path / "outer", tmp_path / "set")
    assert dataset.class_names == ["n01", "n02"] and rows[3]["name"] == "n02/n02_0.png", "as in ImageNet's tar of tars"
    with zipfile.ZipFile(tmp_path / "cats.zip", "w") as archive:
        archive.writestr("cat/1.png", PICTURES[0])
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.writestr("cat/2.png", PICTURES[1])
        archive.writestr("dog/1.png", PICTURES[2])
    both = open_source([str(tmp_path / "cats.zip"), str(tmp_path / "more.zip")])
    assert both.class_names == ["cat", "dog"] and [item.label for item in both.items] == [0, 0, 1]
    assert both.read(both.items[1].key) == PICTURES[1]
    with pytest.raises(DataError, match=r"two images have the same id, such as cat/1.png"):
        open_source([str(tmp_path / "cats.zip")] * 2)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("map.csv", "name,label\na.png,1\nb.png,0\nc/d.png,1\n"),
        ("map.tsv", "a.png\t1\nb\t0\nd.png\t1\n"),
        ("map.json", json.dumps({"a.png": 1, "b.png": "0", "c/d.png": 1, "not/there.png": 0})),
        ("dataset.json", json.dumps({"labels": [["./a.png", 1], ["b.png", 0], ["c/d.png", 1]]})),
    ],
)
def test_label_maps(tmp_path, name, text):
    root = tmp_path / "tree"
    (root / "c").mkdir(parents=True)
    for path, data in zip(("a.png", "b.png", "c/d.png"), PICTURES, strict=False):
        (root / path).write_bytes(data)
    (tmp_path / name).write_text(text)
    dataset, rows = prepared(root, tmp_path / "set", "--labels", str(tmp_path / name))
    assert [row["label"] for row in rows] == [1, 0, 1] and dataset.class_names == ["0", "1"]
    unlabelled, _ = prepared(root, tmp_path / "unlabelled", "--labels", "none")
    assert unlabelled.class_names == [] and unlabelled.fingerprint != dataset.fingerprint
    (root / "new.png").write_bytes(PICTURES[4])
    with pytest.raises(DataError, match=r"1 images have no label in .*such as new.png"):
        prepared(root, tmp_path / "more", "--labels", str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "a.png\n", "row 1 has one column"),
        ("x.csv", "", "is empty"),
        ("x.json", "{", "is no map"),
        ("x.json", "[" * 100_000, "is no map"),
        ("x.json", '{"a.png": [1]}', "is no label"),
        ("x.json", '{"a.png": 4000000000}', "has the label 4000000000"),
        ("x.json", '{"a.png": -3}', "has the label -3"),
        ("gone.csv", None, "cannot be read"),
    ],
)
def test_label_maps_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.png").write_bytes(PICTURES[0])
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        open_source(str(tmp_path / "tree"), parse_labels(str(tmp_path / name), None))
    assert "\n" not in str(error.value)


def test_numbers_and_names_in_one_map_are_names(tmp_path):
    (tmp_path / "x.csv").write_text("a,1\nb,two\n")
    assert read_map(tmp_path / "x.csv") == {"a": "1", "b": "two"}


def png_of(width, height, data=b""):
    """A PNG file that says it has that many pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_pixel_bombs_and_absurd_sizes_are_left_out(tmp_path, monkeypatch):
    """A bomb that is really in the file, one that is only in its head, and members that unpack to too much."""
    monkeypatch.setattr("repa_scale.data.ingest.LARGEST_FILE", 1 << 24)
    cat = tmp_path / "tree" / "cat"
    cat.mkdir(parents=True)
    (cat / "a.png").write_bytes(PICTURES[0])
    (cat / "bomb.png").write_bytes(png_of(9_500, 9_500, zlib.compress(bytes(9_501 * 9_500), 1)))
    (cat / "head.png").write_bytes(png_of(2**31 - 1, 2**31 - 1))
    (cat / "zero.png").write_bytes(png_of(0, 0))
    with (cat / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing: a few bytes on the disk, and in the archive
    archive = tmp_path / "bombs.tar"
    subprocess.run(["tar", "--sparse", "-cf", archive, "-C", tmp_path / "tree", "cat"], check=True)
    assert archive.stat().st_size < 1 << 20
    with zipfile.ZipFile(tmp_path / "zeros.zip", "w", zipfile.ZIP_DEFLATED) as zeros:
        zeros.writestr("cat/b.png", PICTURES[1])
        zeros.writestr("cat/zeros.png", bytes(1 << 25))
    dataset, rows = prepared([archive, tmp_path / "zeros.zip"], tmp_path / "set")
    reasons = {one["name"]: one["reason"] for one in dataset.manifest["quarantined"]}
    assert [row["name"] for row in rows] == ["cat/a.png", "cat/b.png"]
    assert "bomb" in reasons["cat/bomb.png"] and "bomb" in reasons["cat/head.png"]
    assert "33554432 bytes" in reasons["cat/zeros.png"] and f"{1 << 40} bytes" in reasons["cat/sparse.png"]
    assert set(reasons) == {f"cat/{name}.png" for name in ("bomb", "head", "zero", "zeros", "sparse")}
    for one in dataset.manifest["quarantined"]:
        assert one["id"] == int.from_bytes(hashlib.sha256(one["name"].encode()).digest()[:8], "little") >> 1


def test_a_tar_that_says_it_holds_more_than_its_file(tmp_path):
    tar(tmp_path / "a.tar", [("cat/a.png", PICTURES[0])])
    member = tarfile.TarInfo("cat/b.png")
    member.size = 1 << 40
    data = (tmp_path / "a.tar").read_bytes()[: 512 + -(-len(PICTURES[0]) // 512) * 512]
    (tmp_path / "a.tar").write_bytes(data + member.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match="is not a whole tar archive"):
        open_source(str(tmp_path / "a.tar"))


def test_links_and_devices_in_a_tar_are_passed_over(tmp_path):
    (tmp_path / "secret.png").write_bytes(PICTURES[5])
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(f"cat/{name}")
            member.type, member.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(member)
        member = tarfile.TarInfo("cat/a.png")
        member.size = len(PICTURES[0])
        archive.addfile(member, io.BytesIO(PICTURES[0]))
    dataset, rows = prepared(tmp_path / "evil.tar", tmp_path / "set")
    assert [row["name"] for row in rows] == ["cat/a.png"] and dataset.manifest["quarantined"] == []


@pytest.mark.parametrize("kind", ["zip", "tar", "webdataset", "parquet"])
def test_names_that_lead_out_write_nothing_outside(tmp_path, kind):
    room = tmp_path / "room"
    room.mkdir()
    names = ["../up.png", "/root.png", "cat/../../up.png", "cat/ok.png"]
    if kind == "zip":
        source = room / "a.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name in names:
                archive.writestr(name, PICTURES[0])
    elif kind == "tar":
        source = tar(room / "a.tar", [(name, PICTURES[0]) for name in names])
    elif kind == "webdataset":
        both = [(name, PICTURES[0]) for name in names] + [(name[:-3] + "cls", b"0") for name in names]
        source = tar(room / "a.tar", both)
    else:
        source = parquet(room / "a.parquet", PICTURES[:4], [0] * 4, names)
    _, rows = prepared(source, room / "set")
    if kind == "parquet":
        assert [row["name"] for row in rows] == [f"a/{i:07d}" for i in range(4)], "bad paths are no names"
    else:
        assert [row["name"].removeprefix("a/") for row in rows] == ["cat/ok.png"]
    assert listing(tmp_path) == sorted(["room", f"room/{source.name}", *(f"room/{n}" for n in ("set",)),
        *(f"room/set/{n}" for n in ("dataset.json", "index.json", "samples.png", "shard.00000.mds"))])  # fmt: skip
    assert not Path("/root.png").exists()


def test_a_path_in_parquet_is_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(PICTURES[5])
    secret = str(tmp_path / "secret.png")
    file = parquet(tmp_path / "a.parquet", [PICTURES[0], None], [0, 0], ["ok.png", secret])
    dataset, rows = prepared(file, tmp_path / "set")
    assert len(rows) == 1 and "holds no bytes" in dataset.manifest["quarantined"][0]["reason"]


def test_a_parquet_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    """Zeros behind zstd, and one large value that a dictionary repeats."""
    file = parquet(tmp_path / "a.parquet", [bytes(1 << 24)], [0], compression="zstd", use_dictionary=False)
    assert file.stat().st_size < 1 << 16
    with monkeypatch.context() as patch, pytest.raises(DataError, match="unpacks to"):
        patch.setattr("repa_scale.data.tables.LARGEST_GROUP", 1 << 23)
        open_source(str(file))
    options = {"compression": "zstd", "dictionary_pagesize_limit": 1 << 26}
    repeated = parquet(tmp_path / "b.parquet", [bytes(1 << 20)] * 400, [0] * 400, **options)
    group = pq.ParquetFile(repeated).metadata.row_group(0).column(0)
    assert group.total_uncompressed_size < 2 << 20, "a dictionary page holds the value once"
    source = open_source(str(repeated))
    most = 0
    for item in source.items[:40]:
        assert len(source.read(item.key)) == 1 << 20
        most = max(most, pa.total_allocated_bytes())
    assert most < 100 << 20, "400 MB would be there if the group were unpacked at once"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b.mds", "..", "shard\0.mds"])
def test_an_mds_index_that_names_other_places(tmp_path, name):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a.png").write_bytes(PICTURES[0])
    prepared(tmp_path / "tree", tmp_path / "set")
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = name
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    before = listing(tmp_path)
    for words in (
        ["--check", str(tmp_path / "set")],
        [str(tmp_path / "set"), "--out", str(tmp_path / "b"), "--size", "8"],
    ):
        with pytest.raises(DataError, match="not a plain file name"):
            main(words)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("where", ["head", "middle", "cut"])
def test_damaged_containers_are_one_line(tmp_path, where):
    file = parquet(tmp_path / "a.parquet", PICTURES, [0] * 6)
    data = bytearray(file.read_bytes())
    if where == "cut":
        data = data[: len(data) // 2]
    elif where == "head":
        data[-8:-4] = struct.pack("<I", 2**31 - 1)
    else:
        data[len(data) // 3] ^= 255
    file.write_bytes(data)
    if where == "middle":  # no checksum covers it: the picture itself is broken
        dataset, _ = prepared(file, tmp_path / "set")
        assert 0 < len(dataset.manifest["quarantined"]) <= 6
    else:
        with pytest.raises(DataError, match="cannot be read as parquet") as error:
            open_source(str(file))
        assert "\n" not in str(error.value)
    side = tar(tmp_path / "w.tar", [("a.png", PICTURES[0]), ("a.cls", os.urandom(40))])
    with pytest.raises(DataError, match=r"a.cls gives no label"):
        open_source(str(side))


def test_layout_keep_stores_the_files(tmp_path):
    files = {
        "cat/a.jpg": picture(1, (40, 60), "JPEG"),
        "cat/b.png": picture(2, (70, 30)),
        "cat/c.png": PICTURES[0][:200],
    }
    for name, data in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    dataset, rows = prepared(tmp_path / "tree", tmp_path / "set", "--layout", "keep")
    assert [row["image"] for row in rows] == [files["cat/a.jpg"], files["cat/b.png"]]
    assert [one["name"] for one in dataset.manifest["quarantined"]] == ["cat/c.png"]
    assert dataset.manifest["recipe"]["layout"] == "keep" and dataset.manifest["recipe"]["format"] == "original"
    assert main(["--check", str(tmp_path / "set")]) == 0
