"""`repa-scale evaluate RUN --data`: hidden tokens and denoising of a real run, on one process and on two."""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import BIN, SMALL, free_port, train
from PIL import Image

from repa_scale import evaluations, rng
from repa_scale.config import TermConfig
from repa_scale.encoders import build_encoder
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.evaluate import representation
from repa_scale.evaluate.hidden import Asked, Subject, load_projectors
from repa_scale.evaluate.pictures import Block, blocks, choose, open_pictures, seen
from repa_scale.evaluate.representation_page import short_form, write
from repa_scale.interpolant import Interpolant
from repa_scale.metrics.cknna import cknna
from repa_scale.metrics.probe import TEST, probe, split
from repa_scale.objective import denoising_loss
from repa_scale.prepare import main as prepare
from repa_scale.ranks import Ranks
from repa_scale.run_folder import read_metrics
from repa_scale.trained import load_trained

# A run is trained for these; on a busy machine that takes minutes.
pytestmark = pytest.mark.timeout(600)

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
WORDS = ("--depths", "1", "2", "--times", "0.2", "0.6", "--images", "150", "--bins", "3", "--neighbours", "5")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """900 of the digits, which leaves others to measure on."""
    folder = tmp_path_factory.mktemp("half") / "digits"
    assert prepare(["digits", "--out", str(folder), "--size", "8", "--limit", "900"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(half, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "repa"
    train([*SMALL, f"data.path={half}", "train.steps=20", "optimizer.learning_rate=1e-3"], folder, 1, "alone")
    return folder


@pytest.fixture(scope="module")
def evaluated(run, digits):
    """The result of one process: all three measures of the images that the run was not trained on."""
    done = evaluate([sys.executable, "-m", "repa_scale"], run, "--data", digits, "--unseen", *WORDS)
    return done.stdout, json.loads((run / "representation" / "step_00000020.json").read_text())


def evaluate(program, *words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [str(word) for word in (*program, "evaluate", *words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def parsed(source, data, *words):
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    representation.add_options(parser)
    for name, default in (("--data", None), ("--device", "cpu"), ("--run", None), ("--weights", "")):
        parser.add_argument(name, default=default)
    parser.add_argument("--batch", type=int, default=64)
    return parser.parse_args([str(source), "--data", str(data), *map(str, words)])


def refused(kind, source, data, *words):
    with pytest.raises(kind) as caught:
        representation.run(parsed(source, data, *words))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.distributed
def test_figures_are_those_of_a_calculation_by_hand(run, evaluated, half, digits):
    out, found = evaluated
    trained, pictures = load_trained(run), open_pictures(str(digits), 8)
    known = seen(pictures, trained.config, trained.facts["identity_hash"], str(half))
    rows = [pictures.pixels(number) for number in choose(pictures, 150, known)]
    labels, ids = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    images = torch.from_numpy(np.stack([row[0] for row in rows])).permute(0, 3, 1, 2)
    clean = images.float().mean(dim=1, keepdim=True) / 127.5 - 1  # the demo's grey pixels
    model, path = trained.build(), Interpolant("linear")
    noise = rng.normal(0, "evaluation noise", 0, ids, (1, 8, 8))
    t = torch.full((150,), 0.6)
    with torch.no_grad():
        hidden = model(path(clean, noise, t)[0], t, torch.full((150,), 10), [1, 2])[1]
        target = build_encoder("effnet-lite0", "package", (4, 4), "cpu", torch.float32)(images)
        projector = load_projectors(trained, (4, 4), torch.device("cpu"))["repa"][1]
        cosine = torch.cosine_similarity(projector(hidden[1]), target, dim=-1).mean(dim=1)
    alignment = found["alignment"]
    assert (alignment["neighbours"], alignment["depths"], alignment["times"]) == (5, [1, 2], [0.2, 0.6])
    cells = {(cell["depth"], cell["t"]): cell for cell in alignment["encoders"]["effnet-lite0=package"]["cknna"]}
    for depth in (1, 2):
        by_hand = cknna(hidden[depth].mean(dim=1), target.mean(dim=1), 5)
        assert cells[depth, 0.6]["value"] == pytest.approx(by_hand, rel=1e-3)
    at_t = {row["t"]: row for row in alignment["cosine"]}
    assert at_t[0.6]["mean"] == pytest.approx(float(cosine.mean()), rel=1e-4)
    assert at_t[0.6]["standard_error"] == pytest.approx(float(cosine.std()) / math.sqrt(150), rel=1e-3)

    parts = split(ids)
    by_hand = probe(hidden[2].mean(dim=1), labels, parts)
    cell = next(c for c in found["linear_probe"]["cells"] if (c["depth"], c["t"]) == (2, 0.6))
    assert cell["accuracy"] == pytest.approx(by_hand.accuracy, abs=1.01 / int((parts == TEST).sum()))
    assert found["linear_probe"]["best"]["validation"] == max(c["validation"] for c in found["linear_probe"]["cells"])

    t = ((1 + rng.uniform(0, "evaluation time", 1, ids, (), dtype=torch.float64)) / 3).float()
    x_t, velocity = path(clean, rng.normal(0, "evaluation noise of losses", 1, ids, (1, 8, 8)), t)
    with torch.no_grad():
        losses = denoising_loss(model(x_t, t, labels)[0], velocity)
    middle = found["denoising"]["bins"][1]
    assert (middle["from"], middle["to"]) == pytest.approx((1 / 3, 2 / 3))
    assert middle["mean"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert middle["standard_error"] == pytest.approx(float(losses.std()) / math.sqrt(150), rel=1e-4)
    mean = sum(row["mean"] for row in found["denoising"]["bins"]) / 3
    assert found["denoising"]["all"]["mean"] == pytest.approx(mean, rel=1e-6)
    assert "the run was not trained on these images" in out and "step 20, ema weights" in out


@pytest.mark.distributed
def test_the_projectors_weights_give_the_loss_that_was_trained(run, half):
    """The cosine of the weights as trained continues the logged alignment loss, which is minus the same mean."""
    trained, pictures = load_trained(run, "raw"), open_pictures(str(half), 8)
    subject = Subject(trained, [("effnet-lite0", "package")], ALONE)
    times = tuple((i + 0.5) / 10 for i in range(10))
    asked = Asked((1,), times, 1, 0, alignment=True, probe=False, denoising=False)
    block = next(blocks(pictures, list(range(0, 900, 6)), 150, 0, 1))
    cosine = float(subject.measure(block, asked, lambda: None)["cosine repa"].mean())
    logged = [-row["alignment_loss"] for row in read_metrics(run)]
    # The weights are those behind the last update, which the last logged value does not know yet.
    assert logged[0] < 0.02 and logged[-1] > 0.1
    assert logged[-1] - 0.01 < cosine < logged[-1] + 0.07


@pytest.mark.distributed
@pytest.mark.long
def test_two_processes_find_the_same(run, evaluated, digits, tmp_path):
    out = tmp_path / "two.json"
    torchrun = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "repa_scale"]
    evaluate(torchrun, run, "--data", digits, "--unseen", *WORDS, "--out", out)
    assert json.loads(out.read_text()) == evaluated[1]


@pytest.mark.distributed
def test_what_is_written_for_others(run, evaluated):
    result = evaluated[1]
    by_name = {one.metric: one for one in evaluations.read(run)}
    assert set(by_name) >= {"cknna_best", "probe_accuracy_best", "denoising_loss_held_out"}
    for one in by_name.values():
        assert (one.step, one.attempt) == (20, 1) and one.protocol["trained_on"] == "none"
        assert one.protocol["reference"] == result["denoising"]["data"]["images_fingerprint"]
    best = result["alignment"]["encoders"]["effnet-lite0=package"]["best"]
    assert by_name["cknna_best"].value == best["value"]
    assert by_name["cknna_best"].protocol["extractor"] == "effnet-lite0"  # it is the run's own target
    assert by_name["probe_accuracy_best"].count == result["linear_probe"]["images"]["held_out"]
    loss = by_name["denoising_loss_held_out"]
    assert loss.low < loss.value < loss.high and loss.name == "eval/denoising_loss_held_out_n150"
    with Image.open(run / "representation" / "step_00000020.png") as picture:
        assert picture.width >= 480 and len(picture.getcolors(1 << 16)) > 10


@pytest.mark.distributed
def test_which_images_are_held_out(run, half, digits, tmp_path):
    trained = load_trained(run)
    config, identity = trained.config, trained.facts["identity_hash"]
    own, whole, source = (open_pictures(str(path), 8) for path in (half, digits, "digits"))
    ids = torch.tensor([*whole.ids()])
    assert seen(own, config, identity, "").of(torch.tensor([*own.ids()])) == "all"
    known = seen(whole, config, identity, str(half))
    assert known.of(ids) == "some" and len(known.ids) == 900
    assert seen(source, config, identity, str(half)).of(torch.tensor([*source.ids()])) == "some"
    fresh = choose(whole, 10_000, known)
    assert len(fresh) == 1797 - 900 and known.of(ids[fresh]) == "none"
    assert choose(whole, 50, known) == sorted(choose(whole, 50, known)) and set(choose(whole, 50, known)) <= set(fresh)
    with pytest.raises(DataError, match="no image that the run was not trained on"):
        choose(own, 10, seen(own, config, identity, ""))
    for folder in ("", str(tmp_path), str(digits)):
        assert seen(whole, config, identity, folder).of(ids) == "not checked"
    with pytest.raises(DataError, match="--unseen needs the set"):
        choose(whole, 10, seen(whole, config, identity, ""))
    with pytest.raises(DataError, match="is not the set that the run was trained on"):
        seen(whole, config, identity, str(digits), named=True)


@pytest.mark.distributed
def test_the_loss_of_a_model_that_says_zero(run, digits):
    """Then it is the mean square of the velocity, noise minus data: 1 plus the mean square of the pixels."""
    trained = load_trained(run)
    for name in ("weight", "bias"):
        trained.weights[f"final_layer.linear.{name}"].zero_()
    pictures = open_pictures(str(digits), 8)
    block = next(blocks(pictures, list(range(0, 1797, 6)), 300, 0, 1))
    asked = Asked((1,), (0.5,), 4, 7, alignment=False, probe=False, denoising=True)
    losses = Subject(trained, [], ALONE).measure(block, asked, lambda: None)["denoising"]
    assert losses.shape == (300, 4)
    clean = block.images.float().mean(dim=1, keepdim=True) / 127.5 - 1
    for number in range(4):
        noise = rng.normal(7, "evaluation noise of losses", number, block.ids, (1, 8, 8))
        assert torch.allclose(losses[:, number], (noise - clean).square().flatten(1).mean(dim=1), rtol=1e-5)
    closed_form = 1 + float(clean.square().mean())
    error = float(losses.mean(dim=1).std()) / math.sqrt(300)
    assert abs(float(losses.mean()) - closed_form) < 4 * error < 0.05 * closed_form


@pytest.mark.distributed
def test_a_model_that_diverged(run, digits):
    trained = load_trained(run)
    trained.weights["blocks.1.mlp.fc2.bias"].fill_(torch.nan)
    block = next(blocks(open_pictures(str(digits), 8), list(range(20)), 20, 0, 1))
    asked = Asked((1, 2), (0.5,), 2, 0, alignment=False, probe=True, denoising=False)
    with pytest.raises(DataError, match=r"behind block 2 are not finite at t=0\.5; use a checkpoint"):
        Subject(trained, [], ALONE).measure(block, asked, lambda: None)
    with pytest.raises(DataError, match="velocity is not finite"):
        Subject(trained, [], ALONE).measure(
            block, dataclasses.replace(asked, probe=False, denoising=True), lambda: None
        )


@pytest.mark.distributed
def test_input_that_cannot_be_measured(run, digits, tmp_path):
    assert "blocks 1 to 2" in refused(ConfigError, run, digits, "--alignment", "--depths", 3)
    assert "between 0 (data) and 1" in refused(ConfigError, run, digits, "--alignment", "--times", 0.5, 1.5)
    assert "at least 1" in refused(ConfigError, run, digits, "--denoising", "--bins", 0)
    assert "is not an encoder" in refused(ConfigError, run, digits, "--alignment", "--encoder", "dino")
    assert "needs --encoder" in refused(ConfigError, run, digits, "--alignment", "--encoder-weights", "hub")
    assert "--model-weights" in refused(ConfigError, run, digits, "--denoising", "--weights", "raw")
    assert "must end with .json" in refused(ConfigError, run, digits, "--out", tmp_path / "x")
    assert "is not a run folder" in refused(ConfigError, run, digits, "--run", tmp_path)
    assert "does not exist" in refused(DataError, run, tmp_path / "nothing")
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(4):
        Image.new("RGB", (12, 9), (40 * number, 0, 0)).save(flat / f"{number}.png")
    assert "no classes to read off" in refused(DataError, run, flat, "--linear-probe")
    assert "trained on 10 classes" in refused(DataError, run, flat, "--denoising")
    large = tmp_path / "large"
    assert prepare(["digits", "--out", str(large), "--size", "16", "--limit", "20"]) == 0
    assert "images of 16 px" in refused(DataError, run, large, "--alignment")
    assert "is not a run folder with a checkpoint" in refused(DataError, tmp_path, digits)
    # A folder's images are cropped, and a damaged one is named.
    assert open_pictures(str(flat), 8).pixels(2)[0].shape == (8, 8, 3)
    (flat / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
        list(blocks(open_pictures(str(flat), 8), [0, 1], 2, 0, 1))


@pytest.mark.distributed
def test_encoders_that_cannot_be_had(run, tmp_path):
    trained = load_trained(run)
    with pytest.raises(UserError, match="no such file"):
        Subject(trained, [("dinov2-vit-s", str(tmp_path / "none.pth"))], ALONE)
    with pytest.raises(ConfigError, match="no package"):
        Subject(trained, [("dinov2-vit-s", "package")], ALONE)


@pytest.mark.distributed
def test_an_export_and_a_baseline_have_no_projectors(run):
    trained = load_trained(run)
    assert (
        load_projectors(dataclasses.replace(trained, facts={**trained.facts, "source": "/nowhere"}), (4, 4), "cpu")
        == {}
    )
    trained.config.method = "baseline"
    subject = Subject(trained, representation._sources(parsed(run, "-", "--alignment"), trained), ALONE)
    assert list(subject.encoders) == [("effnet-lite0", "package")] and subject.projected == {}
    trained.config.method, trained.config.alignment = "repa", {"two": TermConfig("dinov2-vit-b", "hub")}
    assert representation._sources(parsed(run, "-", "--alignment"), trained) == [("dinov2-vit-b", "hub")]
    named = representation._sources(parsed(run, "-", "--alignment", "--encoder", "effnet-lite0"), trained)
    assert named == [("effnet-lite0", "package")]


def test_depths_that_are_measured_by_default():
    assert representation.default_depths(12, [4]) == list(range(1, 13))
    assert representation.default_depths(28, [8]) == [4, 7, 8, 10, 14, 18, 21, 24, 28]


def test_blocks_are_shared_among_ranks_whole():
    def read(number):
        import io

        data = io.BytesIO()
        Image.new("RGB", (4, 4), (number, 0, 0)).save(data, format="PNG")
        return data.getvalue(), number % 3, 1000 + number, str(number)

    from repa_scale.evaluate.pictures import Pictures

    pictures = Pictures("made up", "", False, ["a", "b", "c"], 23, read, lambda: iter(range(23)), 4, False)
    chosen = list(range(1, 22))
    alone = {block.number: block for block in blocks(pictures, chosen, 5, 0, 1)}
    assert [len(block.images) for block in alone.values()] == [5, 5, 5, 5, 1]
    shared = [block for rank in range(3) for block in blocks(pictures, chosen, 5, rank, 3)]
    assert sorted(block.number for block in shared) == list(alone)
    for block in shared:
        same = alone[block.number]
        assert torch.equal(block.images, same.images) and torch.equal(block.ids, same.ids)
    assert list(blocks(pictures, chosen, 50, 1, 2)) == []
    assert isinstance(alone[0], Block) and alone[0].ids.tolist() == [1001, 1002, 1003, 1004, 1005]


@pytest.mark.distributed
def test_sections_of_an_earlier_call_stay(run, evaluated, tmp_path):
    result = evaluated[1]
    out = tmp_path / "one.json"
    head = {key: result[key] for key in ("format", "checkpoint")}
    write(head | {name: result[name] for name in ("alignment", "linear_probe")}, out, None)
    assert "denoising_loss" not in json.loads(out.read_text())
    write(head | {"denoising": result["denoising"]}, out, None)
    assert json.loads(out.read_text()) == result
    other = head | {"checkpoint": {**head["checkpoint"], "step": 21}}
    write(other | {"denoising": result["denoising"]}, out, None)
    assert "alignment" not in json.loads(out.read_text())


@pytest.mark.distributed
def test_the_short_form_is_what_a_comparison_reads(evaluated):
    result = evaluated[1]
    assert (result["step"], result["encoder"], result["images"]) == (20, "effnet-lite0", 150)
    cells = result["alignment"]["encoders"]["effnet-lite0=package"]["cknna"]
    assert result["cknna"] == [[c["depth"], c["t"], c["value"]] for c in cells] and len(cells) == 4
    assert [row[:2] for row in result["cosine"]] == [[1, 0.2], [1, 0.6]]
    assert [row[2] for row in result["probe_accuracy"]] == [c["accuracy"] for c in result["linear_probe"]["cells"]]
    assert [row[2] for row in result["denoising_loss"]] == [row["mean"] for row in result["denoising"]["bins"]]
    section = {**result["denoising"], "data": {**result["denoising"]["data"], "trained_on": "all"}}
    seen_before = short_form({"checkpoint": result["checkpoint"], "denoising": section})
    assert "denoising_loss" not in seen_before and len(seen_before["denoising_loss_trained_on"]) == 3
