"""benchmarks/nvjpeg.py: it measures what it says, and its rehearsal needs neither a GPU nor torchvision."""

import sys

import pytest
import torch

from benchmarks import nvjpeg

SMALL = {kind: (40, 24, how) for kind, (_, _, how) in nvjpeg.KINDS.items()}


def test_differences_are_counted_by_levels():
    files = [nvjpeg.encoded(n, 40, 24, {"quality": 90, "chroma": "4:2:0"}) for n in range(3)]
    assert files == [nvjpeg.encoded(n, 40, 24, {"quality": 90, "chroma": "4:2:0"}) for n in range(3)]
    assert len(set(files)) == 3

    def off(data):
        if data[0] == files[2]:
            raise RuntimeError("laid by the test")
        (pixels,) = nvjpeg.by_pillow(data)
        pixels[0, :, 0] = torch.where(pixels[0, :, 0] > 127, pixels[0, :, 0] - 5, pixels[0, :, 0] + 5)
        pixels[1, 0, 0] ^= 1
        return [pixels]

    found = nvjpeg.difference(off, files)
    values = 2 * 24 * 40 * 3
    assert (found["pictures"], found["refused"], found["largest"]) == (3, 1, 5)
    assert found["mean"] == pytest.approx((2 * 40 * 5 + 2) / values)
    assert found["share_by_levels"]["4-7"] == pytest.approx(2 * 40 / values)
    assert found["share_by_levels"]["1"] == pytest.approx(2 / values)
    assert sum(found["share_by_levels"].values()) == pytest.approx(1)


@pytest.mark.parametrize("dali", [True, False])
def test_the_rehearsal_needs_neither_torchvision_nor_dali(dali, monkeypatch, tmp_path, capsys):
    rows = []
    monkeypatch.setattr(nvjpeg, "put_row", lambda name, row, rehearsal: rows.append((name, row, rehearsal)))
    monkeypatch.setattr(nvjpeg, "KINDS", SMALL)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    if dali:
        pytest.importorskip("nvidia.dali")
    else:
        monkeypatch.setattr(nvjpeg, "why_not_dali", lambda device: "DALI is not installed")
    (tmp_path / "a.jpg").write_bytes(nvjpeg.encoded(0, 20, 20, {"quality": 90, "grey": True}))
    assert nvjpeg.main(["--rehearse", "--pictures", "1", "--folder", str(tmp_path)]) == 0
    ((name, row, rehearsal),) = rows
    way = "DALI" if dali else "Pillow"
    assert name == "nvjpeg" and rehearsal and list(row["differences"]) == [*SMALL, f"files of {tmp_path.name}"]
    for found in row["differences"].values():
        assert (found[way]["pictures"], found[way]["refused"], found[way]["largest"]) == (1, 0, 0)
    assert row["images_per_second"]["256 px, 4:4:4, quality 95"][way]["median"] > 0
    assert "| 4:2:0, quality 95, 256 px | 0, 0.000, 100.00% |" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvjpeg.main([]) == 64
    assert capsys.readouterr().err == "nvjpeg: torch sees no GPU; rehearse on the CPU with --rehearse\n"
    with pytest.raises(SystemExit, match="0"):
        nvjpeg.main(["--help"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--folder", "none"], "--folder none holds no JPEG files"),
        (["--pictures", "0"], "0 must be a whole number of at least 1"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments_are_one_line(words, line, capsys):
    with pytest.raises(SystemExit, match="64"):
        nvjpeg.main(["--rehearse", *words])
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_a_rehearsal_leaves_no_row_among_the_results(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    monkeypatch.delenv("BENCHMARK_OUT", raising=False)
    monkeypatch.setattr(nvjpeg, "KINDS", SMALL)
    monkeypatch.setattr(nvjpeg, "decoders", lambda device, rehearse: {"Pillow": nvjpeg.by_pillow})
    assert nvjpeg.main(["--rehearse", "--pictures", "1"]) == 0
    assert not list(tmp_path.iterdir())
