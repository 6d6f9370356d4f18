"""`prepare --bench`: each stage is really measured, and the verdict follows from the rates."""

import re

import numpy as np
import pytest
from PIL import Image

from repa_scale import prepare_bench
from repa_scale.cli import main


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "source" / name).mkdir(parents=True)
        for i in range(32):
            pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "source" / name / f"{i}.png")
    out = folder / "set"
    assert main(["prepare", str(folder / "source"), "--out", str(out), "--size", "32", "--workers", "1"]) == 0
    return str(out)


def test_the_stages_and_the_verdict(prepared, monkeypatch, capsys):
    monkeypatch.setattr(prepare_bench, "SECONDS", 0.1)
    capsys.readouterr()
    words = ["--workers", "1", "--model", "SiT-S/2", "--encoder", "effnet-lite0", "--gpu", "A100"]
    assert main(["prepare", "--bench", prepared, *words]) == 0
    text = capsys.readouterr().out
    rates = {
        line[:34].strip(): float(line.split()[-2].replace(",", ""))
        for line in text.splitlines()
        if line.endswith("images/s") and not line.startswith("bottleneck")
    }
    assert len(rates) == 5 and all(rate > 0 for rate in rates.values())
    assert rates["reading shards, cold"] > rates["decoding"]
    loader = rates["loader: reading, decoding, batches"]
    assert f"bottleneck: loader: reading, decoding, batches (1 processes), {loader:,.0f} images/s" in text
    wanted = float(re.search(r"at most ([\d,]+) images/s on one A100", text)[1].replace(",", ""))
    fed = float(re.search(r"feeds (\S+) of them", text)[1])
    assert fed == pytest.approx(loader / wanted, rel=0.1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--gpu", "H10"], "did you mean 'H100'"),
        (["--model", "SiT-XL/3"], "model.name=SiT-XL/3"),
        (["--encoder", "dino"], "encoder=dino is not an encoder"),
    ],
)
def test_wrong_words(prepared, words, line, capsys):
    assert main(["prepare", "--bench", prepared, *words]) == 64
    assert line in capsys.readouterr().err
