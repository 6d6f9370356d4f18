"""Pillow and DALI on a CPU give the same pixels, no fault of DALI is swallowed, and a run keeps its pixels."""

import io
import json
import logging
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import SMALL, Launch, end_all
from PIL import Image

from repa_scale.checkpoint import step_folder
from repa_scale.data import crop, dali, device_crop
from repa_scale.data.dali import REBUILDS, DaliDecoder, DecoderError, left_to_dali, why_not_dali
from repa_scale.data.decode import decode
from repa_scale.data.decoder_choice import Choice, Decoders, pixels_of
from repa_scale.errors import DataError, UserError
from repa_scale.prepare import main as prepare
from repa_scale.ranks import Ranks
from repa_scale.run_folder import pinned_pixels, read_incidents, read_metrics

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


def picture(width=97, height=61, mode="RGB"):
    """Smooth, with edges: like a photograph for a codec."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="JPEG", **words):
    buffer = io.BytesIO()
    image.save(buffer, kind, **words)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    return encoded(picture(), exif=exif)


KINDS = {
    "JPEG 4:2:0": encoded(picture(), quality=90),
    "JPEG 4:4:4": encoded(picture(), quality=95, subsampling=0),
    "JPEG 4:2:2": encoded(picture(), quality=90, subsampling=1),
    "JPEG progressive": encoded(picture(), progressive=True),
    "JPEG grey": encoded(picture(mode="L")),
    "JPEG CMYK": encoded(picture(mode="CMYK")),
    "JPEG turned by EXIF": rotated(),
    "PNG RGB": encoded(picture(), "PNG"),
    "PNG grey": encoded(picture(mode="L"), "PNG"),
    "PNG palette": encoded(picture(mode="P"), "PNG"),
    "PNG with alpha": encoded(picture(mode="RGBA"), "PNG"),
    "PNG 16 bits": encoded(Image.fromarray((np.arange(61 * 97).reshape(61, 97) * 11).astype(np.uint16)), "PNG"),
    "WebP": encoded(picture(), "WEBP"),
}
DIRECT = {name for name in KINDS if name.startswith("JPEG") and "CMYK" not in name} | {"PNG RGB", "PNG grey"}


GOOD = KINDS["JPEG 4:2:0"]
PIXELS = torch.from_numpy(decode(GOOD).copy())
DAMAGED = GOOD[: len(GOOD) // 2]
REFUSED = GOOD[:3] + b"\x00" + GOOD[4:]  # a marker that Pillow passes over and DALI does not


@pytest.fixture(scope="module")
def decoder():
    pytest.importorskip("nvidia.dali")
    return DaliDecoder(len(KINDS), 2, CPU)


def test_every_kind_has_pillows_pixels_exactly(decoder):
    """The table of docs/data.md: nothing differs, and what DALI would show otherwise is left to Pillow."""
    assert {name for name, data in KINDS.items() if left_to_dali(data)} == DIRECT
    found = decoder(list(KINDS.values()), list(KINDS))
    for name, pixels in zip(KINDS, found, strict=True):
        reference = decode(KINDS[name])
        assert pixels.dtype == torch.uint8 and pixels.shape == reference.shape, name
        assert int((pixels.int() - torch.from_numpy(reference.astype(np.int32))).abs().max()) == 0, name


def test_one_bad_picture_loses_no_other(decoder):
    for bad in (b"nothing at all", GOOD[:20], b"\x89PNG\r\n\x1a\n" + bytes(30), DAMAGED):
        found = decoder([GOOD, bad, GOOD], ["a", "b", "c"])
        assert isinstance(found[1], DataError) and str(found[1]).startswith("b cannot be decoded")
        assert torch.equal(found[0], PIXELS) and torch.equal(found[2], PIXELS)
    assert decoder.take_faults() == ()  # of the pictures, not of DALI


def test_pixels_stay_when_the_decoder_goes_on(decoder):
    first = decoder([KINDS["PNG RGB"]], ["a"])[0].clone()
    kept = decoder([KINDS["PNG RGB"]], ["a"])[0]
    decoder([KINDS["PNG grey"]], ["b"])
    assert torch.equal(kept, first)


@pytest.fixture
def built(monkeypatch):
    """DALI's pipelines as they are built; `built.refuse` makes a build fail, `built.fail_runs` the next runs."""
    pytest.importorskip("nvidia.dali")
    return Built(monkeypatch)


class Built(list):
    def __init__(self, monkeypatch):
        self.refuse = lambda number: False
        self.fail_runs = 0
        build = dali._pipeline

        def counted(*arguments):
            self.append(arguments)
            if self.refuse(len(self)):
                raise RuntimeError("laid by the test: no memory")
            pipeline = build(*arguments)
            run = pipeline.run
            pipeline.run = lambda: self.fail() if self.fail_runs else run()
            return pipeline

        monkeypatch.setattr(dali, "_pipeline", counted)

    def fail(self):
        self.fail_runs -= 1
        raise RuntimeError("Critical error in pipeline:\nencountered:\n\nlaid by the test\n")


@pytest.fixture
def pillow_marks(monkeypatch):
    """Pictures that Pillow decodes come out black, so that they show."""
    pillow = dali.decode
    monkeypatch.setattr(dali, "decode", lambda *arguments: pillow(*arguments) * 0)


def test_batches_build_the_pipeline_once(built, pillow_marks):
    decoder = DaliDecoder(4, 1, CPU)
    for size in (4, 2, 3):
        assert all(torch.equal(pixels, PIXELS) for pixels in decoder([GOOD] * size, ["a"] * size))
    assert len(built) == 1


def test_a_damaged_picture_leaves_the_decoder_of_the_others(built, pillow_marks):
    decoder = DaliDecoder(4, 1, CPU)
    found = decoder([GOOD, DAMAGED, GOOD], ["a", "b", "c"])
    assert torch.equal(found[0], PIXELS) and torch.equal(found[2], PIXELS) and isinstance(found[1], DataError)
    assert len(built) == 2 and decoder.take_faults() == ()


def test_a_picture_that_pillow_alone_can_read_is_reported(built, pillow_marks):
    decoder = DaliDecoder(4, 1, CPU)
    found = decoder([GOOD, REFUSED, DAMAGED], ["a", "b", "c"])
    assert torch.equal(found[0], PIXELS) and not found[1].any() and isinstance(found[2], DataError)
    (fault,) = decoder.take_faults()
    assert (fault.kind, fault.reason) == ("picture", "b: nvImageCodec failure: '#3'")
    assert decoder.take_faults() == ()


def test_a_decoder_that_refuses_every_picture_ends_the_run(decoder):
    """Else Pillow would quietly be the decoder."""
    refusing = DaliDecoder(4, 1, CPU)
    for _ in range(4):
        refusing([REFUSED] * 4, list("abcd"))
    with pytest.raises(
        DecoderError, match="refuses 20 pictures in a row that Pillow can read, the last one d: nvImage"
    ):
        refusing([REFUSED] * 4, list("abcd"))
    assert len(refusing.take_faults()) == 20


def test_a_failed_pipeline_is_built_again_a_few_times(built, pillow_marks):
    decoder = DaliDecoder(4, 1, CPU)
    for _ in range(REBUILDS):
        built.fail_runs = 1
        assert all(torch.equal(pixels, PIXELS) for pixels in decoder([GOOD] * 2, ["a", "b"]))
        assert [(fault.kind, fault.reason) for fault in decoder.take_faults()] == [("pipeline", "laid by the test")]
    assert len(built) == 1 + REBUILDS
    built.fail_runs = 1
    with pytest.raises(DecoderError, match=r"failed 4 times, .*laid by the test; .*data\.decoder=pillow"):
        decoder([GOOD] * 2, ["a", "b"])


@pytest.mark.parametrize("how", ["it cannot be built again", "it cannot even decode the probe"])
def test_a_dali_that_died_ends_the_run_with_one_line(built, how):
    decoder = DaliDecoder(4, 1, CPU)
    decoder([GOOD], ["a"])
    built.fail_runs = 1 if "built" in how else 1000
    built.refuse = lambda number: "built" in how
    with pytest.raises(
        DecoderError, match=r"DALI on cpu stopped decoding \(.*and a new pipeline fails as well"
    ) as error:
        decoder([GOOD] * 2, ["a", "b"])
    assert "\n" not in str(error.value) and len(built) <= 4


def test_whether_dali_works_is_found_out_by_decoding(built):
    assert why_not_dali(CPU) is None and len(built) == 1
    built.refuse = lambda number: True
    assert why_not_dali(CPU).startswith("DALI cannot decode on cpu (laid by the test: no memory)")
    if not torch.cuda.is_available():
        assert why_not_dali(GPU).startswith(
            "DALI cannot decode on cuda:0 (laid by the test: no memory); wheel nvidia-dali"
        )


JPEG, PNG, KEPT = {"format": "jpeg"}, {"format": "png"}, {"format": "original", "layout": "keep"}


def test_which_decoders_give_the_same_pixels():
    assert {pixels_of("pillow", gpu, recipe) for gpu in (False, True) for recipe in (JPEG, PNG, KEPT)} == {"pillow"}
    assert [pixels_of("dali", False, recipe) for recipe in (JPEG, PNG, KEPT)] == ["pillow", "pillow", "dali-cpu"]
    assert [pixels_of("dali", True, recipe) for recipe in (JPEG, PNG, KEPT)] == ["nvjpeg", "pillow", "nvjpeg"]


def chosen(wanted, pinned=None, gpu=True, problem="", recipe=JPEG):
    found = Decoders(wanted, {name: pixels_of(name, gpu, recipe) for name in ("pillow", "dali")}, gpu, problem)
    choice = found.choose(pinned)
    return choice.decoder, choice.pixels, choice.replaced


def test_the_choice_follows_the_pin():
    broken = "rank 3 on host: DALI cannot decode on cuda:3 (old driver)"
    assert chosen("auto") == ("dali", "nvjpeg", None)
    assert chosen("auto", gpu=False) == chosen("auto", problem=broken) == ("pillow", "pillow", None)
    assert chosen("auto", "nvjpeg") == ("dali", "nvjpeg", None)
    assert chosen("auto", "pillow") == ("pillow", "pillow", None)
    assert chosen("auto", "pillow", recipe=PNG) == ("dali", "pillow", None)
    assert chosen("pillow", "nvjpeg") == ("pillow", "pillow", "nvjpeg")
    assert chosen("dali", "pillow") == ("dali", "nvjpeg", "pillow")
    assert chosen("dali", "pillow", gpu=False) == ("dali", "pillow", None)
    for words, reason in (
        ({"problem": broken}, "rank 3 on host: DALI cannot decode on cuda:3 .old driver."),
        ({"gpu": False}, "nvJPEG needs a GPU"),
    ):
        with pytest.raises(UserError, match=rf"pixels of nvjpeg;.*{reason}.*with data\.decoder=pillow"):
            chosen("auto", "nvjpeg", **words)
    with pytest.raises(UserError, match=r"pixels of dali-cpu; keep them with data\.decoder=dali, or"):
        chosen("auto", "dali-cpu", gpu=False, recipe=KEPT)
    assert Decoders("auto", {}, True).choose(None) == Choice("pillow")  # nothing is decoded


class TwoHosts(Ranks):
    """Rank 0 of two, the other of which says `other`."""

    other = None

    def gather_objects(self, value):
        return [value, ("there", self.other)]


def test_all_ranks_decide_together(caplog, monkeypatch):
    tried = []
    monkeypatch.setattr("repa_scale.data.decoder_choice.why_not_dali", lambda device: tried.append(device))
    ranks = TwoHosts(0, 0, 2, GPU)
    assert Decoders.found("auto", ranks, JPEG, True).choose(None).decoder == "dali"
    monkeypatch.setattr(TwoHosts, "other", "DALI cannot decode on cuda:0 (old driver)")
    with caplog.at_level(logging.INFO, "repa_scale"):
        choice = Decoders.found("auto", ranks, JPEG, True).choose(None)
        choice.tell()
    assert (choice.decoder, choice.pixels) == ("pillow", "pillow") and tried == [GPU] * 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        "data.decoder=auto: Pillow, because rank 1 on there: DALI cannot decode on cuda:0 (old driver)"
    )
    with pytest.raises(UserError, match=r"data\.decoder=dali, but rank 1 on there: DALI cannot .*data\.decoder=pillow"):
        Decoders.found("dali", ranks, JPEG, True)
    Decoders.found("dali", ranks, JPEG, False)  # nothing to decode, nothing to refuse
    Decoders.found("pillow", ranks, JPEG, True)
    assert len(tried) == 3


def test_a_run_that_was_fetched_from_a_store_has_its_pin_in_the_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints" / step_folder(7)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"step": 7, "pixels": "nvjpeg"}')
    assert pinned_pixels(tmp_path) == "nvjpeg"
    (tmp_path / "identity.json").write_text('{"keys": {}}')
    assert pinned_pixels(tmp_path) == "nvjpeg"
    (tmp_path / "identity.json").write_text('{"keys": {}, "pixels": "pillow"}')
    assert pinned_pixels(tmp_path) == "pillow"
    (folder / "manifest.json").unlink()  # without a checkpoint the run starts over, with any pixels
    assert pinned_pixels(tmp_path) is None


def test_a_run_of_the_first_release_keeps_pillows_pixels_on_a_gpu():
    pinned = pinned_pixels(Path(__file__).parent / "run_v1" / "run")
    assert chosen("auto", pinned) == ("pillow", "pillow", None)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """16 JPEG files as they are, one of which DALI cannot read."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "files").mkdir()
    for number in range(16):
        (folder / "files" / f"{number}.jpg").write_bytes(REFUSED if number == 5 else GOOD)
    words = ["--out", str(folder / "set"), "--size", "8", "--layout", "keep", "--workers", "1"]
    assert prepare([str(folder / "files"), *words]) == 0
    return folder / "set"


def start(dataset, run, *words, processes=1, **environment):
    words = [*SMALL, "experiment=demo_baseline", f"data.path={dataset}", "model.num_classes=0", *words]
    words.remove("experiment=demo_repa")
    words = [word for word in words if not word.startswith("alignment.")]
    return Launch(words, run, processes, "alone" if processes == 1 else "torchrun", **environment)


@pytest.fixture
def nothing_stays_behind():
    yield
    end_all()


@pytest.fixture(scope="module")
def decoded_by_dali(kept, tmp_path_factory):
    """A run of 4 steps behind DALI on the CPU."""
    pytest.importorskip("nvidia.dali")
    run = tmp_path_factory.mktemp("pinned") / "run"
    start(kept, run, "train.steps=4", "data.decoder=dali").succeed()
    return run


@pytest.mark.distributed
def test_a_run_is_pinned_to_its_pixels(kept, decoded_by_dali, nothing_stays_behind):
    run = decoded_by_dali
    identity = json.loads((run / "identity.json").read_text())
    manifest = json.loads((run / "checkpoints" / step_folder(4) / "manifest.json").read_text())
    assert identity["pixels"] == manifest["pixels"] == "dali-cpu"
    assert [row["decode_fallbacks"] for row in read_metrics(run)][-1] == 2  # 32 samples: the picture came twice
    (told,) = read_incidents(run)
    assert told["kind"] == "decode_fallback" and told["rank"] == 0 and "5.jpg" in told["reason"]

    refused = start(kept, run, "train.steps=5")
    assert refused.wait() == 64 and "dali-cpu; keep them with data.decoder=dali, or" in refused.text()
    assert json.loads((run / "identity.json").read_text()) == identity and len(read_incidents(run)) == 1


@pytest.mark.long
@pytest.mark.distributed
def test_an_explicit_decoder_changes_the_pin(kept, decoded_by_dali, tmp_path, nothing_stays_behind):
    run = tmp_path / "run"
    shutil.copytree(decoded_by_dali, run)
    identity = json.loads((run / "identity.json").read_text())
    rows = start(kept, run, "train.steps=5", "data.decoder=pillow").succeed()
    assert json.loads((run / "identity.json").read_text()) == {**identity, "pixels": "pillow"}
    changed = read_incidents(run)[-1]
    assert (changed["kind"], changed["before"], changed["now"]) == ("decoder_changed", "dali-cpu", "pillow")
    assert rows[-1]["step"] == 5 and "decode_fallbacks" not in rows[-1]
    start(kept, run, "train.steps=6").succeed()
    assert len(read_incidents(run)) == 2


@pytest.mark.long
@pytest.mark.distributed
def test_one_rank_without_dali_ends_the_start(kept, tmp_path, nothing_stays_behind):
    pytest.importorskip("nvidia.dali")
    faults = json.dumps([["no_dali", 1]])
    launch = start(kept, tmp_path / "run", "data.decoder=dali", processes=2, FAULTS=faults)
    launch.wait()  # torchrun makes 1 of every code
    line = f"data.decoder=dali, but rank 1 on {platform.node()}: DALI cannot decode on cpu (laid by the test); or use"
    assert launch.text().count(line) == 1 and "exitcode  : 64" in launch.text()
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.is_available(), reason="DALI works on this GPU")
def test_auto_without_a_working_dali_says_so_once_and_takes_pillow(kept, tmp_path, nothing_stays_behind):
    run = tmp_path / "run"
    faults = json.dumps([["choose_as_on_a_gpu", "all"]])
    launch = start(kept, run, "train.steps=3", "data.decoder=auto", processes=2, FAULTS=faults)
    launch.succeed()
    warnings = [line for line in (run / "log" / "rank_0.log").read_text().splitlines() if " WARNING " in line]
    (line,) = [line for line in warnings if "data.decoder" in line]
    assert f"data.decoder=auto: Pillow, because rank 0 on {platform.node()}: DALI " in line
    assert json.loads((run / "identity.json").read_text())["pixels"] == "pillow" and not read_incidents(run)


@pytest.mark.parametrize("shape", [(256, 256), (300, 256), (640, 480), (1001, 777), (513, 2050), (1024, 1030)])
def test_the_crop_on_the_device_is_pillows(shape):
    image = picture(*shape)
    compare(image, 256)


def test_the_crop_on_the_device_of_photographs(data_folder):
    import zipfile

    with zipfile.ZipFile(data_folder / "imagenet_samples.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")][:20]
        for name in names:
            compare(Image.open(io.BytesIO(archive.read(name))).convert("RGB"), 256)


def compare(image, size):
    """At most 2 of 255, in less than 1 % of the values."""
    wanted = np.asarray(crop.center_crop(image, size)).astype(int)
    found = device_crop.center_crop(torch.from_numpy(np.array(image)), size).numpy().astype(int)
    difference = np.abs(found - wanted)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01, (image.size, difference.max())
