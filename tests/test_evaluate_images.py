"""`repa-scale evaluate samples.npz --reference ...` as a user types it: its files, its cache, and every wrong input."""

import json
import subprocess

import numpy as np
import pytest
import torch
from launching import BIN, free_port
from PIL import Image

from repa_scale import cli, evaluations
from repa_scale.evaluate.image_sets import open_images
from repa_scale.evaluate.reference import NAMED
from repa_scale.extractors import build_extractor
from repa_scale.metrics.frechet import Moments, frechet_distance
from repa_scale.metrics.kid import kernel_distance


def pictures(count, seed, size=16):
    """(count, size, size, 3) uint8: smooth colours."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (smooth * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


@pytest.fixture(scope="module")
def extractor():
    return build_extractor("effnet-lite0")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A folder with 13 samples and 12 reference images; the cache is common to all tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    np.savez("samples.npz", arr_0=pictures(13, 0), labels=np.arange(13))
    np.savez_compressed("reference.npz", arr_0=pictures(12, 1))
    return tmp_path


def results(file="samples.evaluation.json"):
    return {row["metric"]: row for row in json.load(open(file))["results"]}


def refused(capsys, *words):
    """The one line with which a user's mistake is answered."""
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, words)]) == 64
    lines = [line for line in capsys.readouterr().err.splitlines() if "accelerator" not in line]
    assert len(lines) == 1 and lines[0].startswith("repa-scale: error: "), lines
    return lines[0]


def test_values_are_those_of_the_features(place, extractor, capsys):
    assert cli.main(["evaluate", "samples.npz", "--reference", "reference.npz", "--batch", "4"]) == 0
    ours, real = (extractor(torch.from_numpy(pictures(*which)).permute(0, 3, 1, 2)) for which in ((13, 0), (12, 1)))
    found = results()
    assert set(found) == {"fd_effnet", "kid_effnet", "precision_effnet", "recall_effnet"}
    distance = frechet_distance(Moments.of(ours), Moments.of(real))
    assert found["fd_effnet"]["value"] == pytest.approx(distance, rel=1e-4)
    assert found["kid_effnet"]["value"] == pytest.approx(kernel_distance(ours, real).value, rel=1e-3)
    for row in found.values():
        assert row["low"] <= row["value"] <= row["high"] and row["count"] == 13
        assert row["protocol"]["extractor"] == "effnet-lite0" and row["protocol"]["reference_count"] == 12
    assert "fd_effnet" in capsys.readouterr().out


@pytest.mark.long
def test_files_archives_and_prepared_sets_are_the_same_images(place):
    images = pictures(12, 1)
    for number, image in enumerate(images):
        folder = place / "files" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:02d}.png")
    assert cli.main(["prepare", "files", "--out", "set", "--size", "16"]) == 0
    subprocess.run(["tar", "-cf", "files.tar", "files"], check=True)
    plain = place / "plain"
    plain.mkdir()
    np.savez(plain / "samples.npz", arr_0=images)
    by_class = images[np.argsort(np.arange(12) % 2, kind="stable")]
    for path, wanted in (
        ("reference.npz", images),
        (plain, images),
        ("files", by_class),
        ("files.tar", by_class),
    ):
        found = open_images(path)
        assert found.count == 12 and found.size == (16, 16)
        assert np.array_equal(np.concatenate(list(found.read(0, 12, 5))), wanted)
        assert np.array_equal(np.concatenate(list(found.read(4, 9, 2))), wanted[4:9])
    prepared = np.concatenate(list(open_images("set").read(0, 12, 5)))
    assert sorted(map(bytes, prepared)) == sorted(map(bytes, images))
    values = []
    for reference in ("reference.npz", "set"):
        assert cli.main(["evaluate", "samples.npz", "--reference", reference, "--metrics", "fd"]) == 0
        values.append(results()["fd_effnet"]["value"])
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.long
def test_statistics_of_a_reference_are_made_once_and_checked(place, caplog):
    words = ["evaluate", "samples.npz", "--reference", "reference.npz", "--metrics", "fd", "--cache", "own"]

    def run():
        caplog.clear()
        assert cli.main(words) == 0
        return results()["fd_effnet"]["value"]

    first = run()
    (file,) = (place / "own").glob("*.npz")
    made = file.stat().st_mtime_ns
    assert run() == first and file.stat().st_mtime_ns == made, "the second time from the cache"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert run() == first and "is damaged" in caplog.text and file.stat().st_mtime_ns > made
    file.write_bytes(data[: len(data) // 2])
    assert run() == first and "is damaged" in caplog.text
    np.savez_compressed("reference.npz", arr_0=pictures(12, 2))
    assert run() != first, "other contents under the same name"
    assert len(list(file.parent.glob("*.npz"))) == 2 and not list(file.parent.glob("*tmp*"))
    (place / "file").write_text("")
    assert cli.main([*words[:-1], "file"]) == 0 and "are not cached" in caplog.text


@pytest.fixture
def run_folder(place):
    """A run with one checkpoint, as far as an evaluation looks at it, and the sidecar of samples of it."""
    checkpoint = place / "run" / "checkpoints" / "step_00000500"
    checkpoint.mkdir(parents=True)
    (place / "run" / "config.yaml").write_text("seed: 0\n")
    (place / "run" / "status.json").write_text('{"state": "completed", "attempt": 3}')
    facts = {"source": str(checkpoint), "step": 500, "weights": "ema", "sampler": "sde", "steps": 250, "guidance": 1.8}
    (place / "samples.json").write_text(json.dumps({**facts, "interval": [0.0, 0.7], "classes": "balanced", "seed": 1}))
    return place / "run"


def test_values_join_the_run_whose_checkpoint_the_samples_are_of(run_folder, place):
    assert cli.main(["evaluate", "samples.npz", "--reference", "reference.npz", "--metrics", "fd"]) == 0
    (found,) = evaluations.read(run_folder)
    assert (found.step, found.attempt, found.metric, found.count) == (500, 3, "fd_effnet", 13)
    assert found.name == "eval/fd_effnet_n13" and found.low < found.value < found.high
    wanted = {"sampler": "sde", "steps": 250, "guidance": 1.8, "interval": [0.0, 0.7], "labels": "balanced"}
    assert wanted.items() <= found.protocol.items()
    assert found.value == results()["fd_effnet"]["value"]


def test_a_run_can_be_named_for_samples_from_elsewhere(run_folder, place, capsys):
    (place / "samples.json").unlink()
    words = ["samples.npz", "--reference", "reference.npz", "--metrics", "fd"]
    assert "add --step" in refused(capsys, *words, "--run", run_folder)
    assert "is not a run folder" in refused(capsys, *words, "--run", place, "--step", 9)
    assert cli.main(["evaluate", *words, "--run", str(run_folder), "--step", "9"]) == 0
    assert [one.step for one in evaluations.read(run_folder)] == [9]


def test_samples_that_their_sidecar_does_not_describe_are_refused(run_folder, place, capsys):
    sidecar = json.loads((place / "samples.json").read_text())
    (place / "samples.json").write_text(json.dumps({**sidecar, "sha256": "0" * 64}))
    assert "is not the file that samples.json describes" in refused(
        capsys, "samples.npz", "--reference", "reference.npz"
    )


@pytest.mark.long
@pytest.mark.distributed
def test_two_processes_measure_the_same(place):
    words = ["evaluate", "samples.npz", "--reference", "reference.npz", "--device", "cpu"]
    command = [BIN / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "repa_scale"]
    subprocess.run([*map(str, command), *words, "--cache", "theirs"], check=True, capture_output=True)
    two = results()
    assert cli.main([*words, "--cache", "ours"]) == 0
    for name, row in results().items():
        for key in ("value", "low", "high"):
            assert two[name][key] == pytest.approx(row[key], rel=1e-3, abs=1e-6), (name, key)


@pytest.mark.long
def test_references_of_the_adm_suite(place, capsys):
    """mu, sigma, mu_s, sigma_s and arr_0 of an .npz, by Inception (of random weights, from a file)."""
    extractor = build_extractor("inception", "random")
    torch.save(_unfolded(extractor), "inception.pth")
    real, ours = (extractor.parts(torch.from_numpy(pictures(*w)).permute(0, 3, 1, 2)) for w in ((30, 1), (13, 0)))
    statistics = {
        name: value
        for part, end in (("pool", ""), ("spatial", "_s"))
        for name, value in ((f"mu{end}", real[part].numpy().mean(0)), (f"sigma{end}", np.cov(real[part].T.double())))
    }
    np.savez("adm.npz", arr_0=pictures(20, 2), **statistics)
    np.savez("alone.npz", mu=statistics["mu"], sigma=statistics["sigma"])
    words = ["--extractor", "inception", "--inception-weights", "inception.pth"]
    assert cli.main(["evaluate", "samples.npz", "--reference", "adm.npz", *words]) == 0
    found = results()
    assert set(found) == {"fid", "sfid", "kid", "precision", "recall"}, "no inception score of 13 images"
    for name, part in (("fid", "pool"), ("sfid", "spatial")):
        distance = frechet_distance(Moments.of(ours[part]), Moments.of(real[part]))
        assert found[name]["value"] == pytest.approx(distance, rel=1e-3)
    assert cli.main(["evaluate", "samples.npz", "--reference", "alone.npz", *words]) == 0
    assert set(results()) == {"fid"}
    for metric, lack in (("sfid", "no sfid statistics"), ("kid", "has statistics alone")):
        asked = refused(capsys, "samples.npz", "--reference", "alone.npz", *words, "--metrics", metric)
        assert lack in asked


def _unfolded(extractor):
    """The tensors in the form of torch-fidelity's file, with normalisation that does nothing."""
    tensors = {}
    for name, value in extractor.network.network.state_dict().items():
        if name.endswith("conv.bias"):
            width, base = len(value), name.removesuffix("conv.bias") + "bn."
            scale = (1 - 0.001) ** 0.5  # the variance is kept without epsilon
            ones = torch.ones(width)
            tensors |= {f"{base}weight": ones, f"{base}bias": value, f"{base}running_mean": 0 * ones}
            tensors |= {f"{base}running_var": ones * scale**2, f"{base}num_batches_tracked": torch.tensor(0)}
        else:
            tensors[name] = value
    return tensors


@pytest.mark.long
def test_the_documented_check_of_the_adm_suite(tmp_path, monkeypatch):
    """Where REPA_SCALE_ADM names the folder with both files: the values that the suite prints for them."""
    import os
    from pathlib import Path

    folder = Path(os.environ.get("REPA_SCALE_ADM", "none"))
    samples, reference = (folder / f for f in ("admnet_guided_upsampled_imagenet256.npz", NAMED["imagenet256"]))
    if not (samples.is_file() and reference.is_file()):
        pytest.skip("REPA_SCALE_ADM: a folder with the ADM suite's reference and sample batches")
    (tmp_path / samples.name).symlink_to(samples)
    words = ["--reference", str(reference), "--extractor", "inception", "--cache", str(tmp_path)]
    assert cli.main(["evaluate", str(tmp_path / samples.name), *words]) == 0
    found = {name: row["value"] for name, row in results(next(tmp_path.glob("*.evaluation.json"))).items()}
    assert found["fid"] == pytest.approx(3.94256, abs=0.05)
    assert found["sfid"] == pytest.approx(6.14043, abs=0.1)
    assert found["inception_score"] == pytest.approx(215.8370, abs=1.5)
    assert found["precision"] == pytest.approx(0.8265, abs=0.005)
    assert found["recall"] == pytest.approx(0.5309, abs=0.005)


def test_images_that_cannot_be_measured(place, capsys):
    good = pictures(6, 3)

    def said(**arrays):
        np.savez("bad.npz", **arrays)
        return refused(capsys, "bad.npz", "--reference", "reference.npz")

    assert "is float32; metrics are of 8-bit images" in said(arr_0=(good / 255).astype(np.float32))
    assert "images in [0, 1] were cut" in said(arr_0=good // 128)
    assert "must be (N, H, W, 3), channels last" in said(arr_0=good.transpose(0, 3, 1, 2))
    assert "must be (N, H, W, 3)" in said(arr_0=good[..., 0])
    assert "but no arr_0" in said(images=good)
    assert "stored by columns" in said(arr_0=np.asfortranarray(good))
    assert "holds pickled objects, which are never read" in said(arr_0=np.array([good, None], dtype=object))
    assert "fd needs at least 2" in said(arr_0=good[:1])
    data = (place / "samples.npz").read_bytes()
    (place / "short.npz").write_bytes(data[: len(data) // 2])
    assert "is no whole .npz" in refused(capsys, "short.npz", "--reference", "reference.npz")
    broken = bytearray(data)
    broken[2000] ^= 255
    (place / "broken.npz").write_bytes(broken)
    assert "Bad CRC-32" in refused(capsys, "broken.npz", "--reference", "reference.npz")
    assert "does not exist" in refused(capsys, "none.npz", "--reference", "reference.npz")


def test_folders_that_cannot_be_measured(place, capsys):
    folder = place / "folder"
    folder.mkdir()
    for number, size in enumerate((16, 16, 20)):
        Image.fromarray(pictures(1, number, size)[0]).save(folder / f"{number}.png")
    assert "2.png is 20 x 20 and 0.png 16 x 16" in refused(capsys, "folder", "--reference", "reference.npz")
    Image.fromarray(np.random.default_rng(0).random((16, 16)).astype(np.float32)).save(folder / "2.tiff")
    (folder / "2.png").unlink()
    assert "pixels of the kind F" in refused(capsys, "folder", "--reference", "reference.npz")
    (folder / "2.tiff").write_bytes(b"not an image")
    assert "2.tiff is no image" in refused(capsys, "folder", "--reference", "reference.npz")
    (place / "empty").mkdir()
    assert "holds no images" in refused(capsys, "empty", "--reference", "reference.npz")


def test_references_that_do_not_fit(place, capsys, monkeypatch):
    np.savez("large.npz", arr_0=pictures(5, 3, size=20))
    assert "the samples are 16 x 16" in refused(capsys, "samples.npz", "--reference", "large.npz")
    said = refused(capsys, "samples.npz", "--reference", "imagenet256")
    assert "VIRTUAL_imagenet256_labeled.npz is not in" in said and "REPA_SCALE_REFERENCES" in said
    np.savez("inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "use --extractor inception" in refused(capsys, "samples.npz", "--reference", "inception.npz")
    np.savez("inception.npz", mu=np.zeros(2048), sigma=np.eye(4))
    assert "are no mean and covariance" in refused(capsys, "samples.npz", "--reference", "inception.npz")
    np.savez("inception.npz", mu=np.zeros(2048))
    assert "has no sigma" in refused(capsys, "samples.npz", "--reference", "inception.npz")


def test_wrong_words(place, capsys, tmp_path):
    words = ("samples.npz", "--reference", "reference.npz")
    assert "fd is the same distance by any extractor" in refused(capsys, *words, "--metrics", "fid")
    assert "did you mean 'precision'" in refused(capsys, *words, "--metrics", "precison")
    few = refused(capsys, *words, "--extractor", "inception", "--metrics", "is")
    assert "has 13 images, is needs at least 1008, one for each of Inception's classes" in few
    assert "there is no such file" in refused(capsys, *words, "--weights", tmp_path / "none.pth")
    assert "use --weights" in refused(capsys, *words, "--inception-weights", "file.pth")
    assert "give --reference" in refused(capsys, "samples.npz")
    assert "at least 1" in refused(capsys, *words, "--batch", 0)


def test_activations_that_are_not_finite_are_refused(place, capsys):
    import timm

    tensors = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors["conv_head.weight"][0, 0, 0, 0] = torch.nan
    torch.save(tensors, "nan.pth")
    said = refused(capsys, "samples.npz", "--reference", "reference.npz", "--weights", "nan.pth")
    assert "the features of image 0 are not finite" in said
