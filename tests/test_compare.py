"""The comparison from run folders: a headline where it is earned, and its refusal where it is not."""

import json
import subprocess
from importlib.resources import files

import jsonschema
import pytest
from made_up_runs import EVALUATED, quality, write_pair, write_run
from PIL import Image

from repa_scale.cli import main
from repa_scale.errors import DataError


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Three seeds of each method; REPA is three times as fast, its steps take a tenth longer."""
    return write_pair(tmp_path_factory.mktemp("sweep"))


def compare(out, runs, *words):
    """compare.json, which fits the schema, and the page."""
    from repa_scale.compare import main as verb

    assert verb(["--runs", *map(str, runs), "--out", str(out), *words]) == 0
    result = json.loads((out / "compare.json").read_text())
    schema = json.loads(files("repa_scale.compare").joinpath("schema.json").read_text())
    jsonschema.validate(result, schema, cls=jsonschema.Draft202012Validator)
    return result, (out / "index.html").read_text()


def two(tmp_path, ours=None, theirs=None, **both):
    """One REPA run, twice as fast, and one baseline."""
    runs = (("repa", {"curve": lambda step: quality(2 * step)} | (ours or {})), ("baseline", theirs or {}))
    return [write_run(tmp_path / method, method, **(both | own)) for method, own in runs]


def no_speed_up(page, result):
    body = page.split("</script>", 1)[1]
    assert "times fewer steps" not in result["headline"] and "times more steps" not in result["headline"]
    assert not any(one["targets"] for one in result["metrics"].values()) and result["verdict"]["metric"] is None
    assert "reached at step" not in body
    return True


def test_the_headline_agrees_with_a_calculation_by_hand(sweep, tmp_path, capsys):
    result, page = compare(tmp_path / "report", sweep)
    row = result["metrics"]["fid_n50000"]["targets"]["repa"][0]
    values = result["metrics"]["fid_n50000"]["values"]
    level = sum(values[f"baseline-seed{seed}"][-1]["value"] for seed in range(3)) / 3
    ours = [sum(values[f"repa-seed{seed}"][i]["value"] for seed in range(3)) / 3 for i in range(len(EVALUATED))]
    i = next(i for i, value in enumerate(ours) if value <= level)
    share = (ours[i - 1] - level) / (ours[i - 1] - ours[i])
    at = EVALUATED[i - 1] ** (1 - share) * EVALUATED[i] ** share
    assert row["level"] == pytest.approx(level) and row["ours"]["step"] == pytest.approx(at)
    steps, time = row["axes"]["steps"], row["axes"]["wall_seconds"]
    assert steps["ratio"] == pytest.approx(400_000 / at) == pytest.approx(3.0, rel=0.1)
    assert steps["low"] < 3.0 < steps["high"]
    assert time["ratio"] == pytest.approx((400_000 * 0.2 + 60) / (at * 0.22 + 60), rel=1e-6)
    flops = row["axes"]["flops"]["ratio"]
    assert 0.8 * steps["ratio"] < flops < steps["ratio"], "projector and encoder are counted"
    assert row["axes"]["samples"]["ratio"] == pytest.approx(steps["ratio"])
    text = f"REPA reaches the baseline's final FID (50,000 samples) of {level:.4g} at {at:,.0f} steps: "
    text += f"{steps['ratio']:.2f} times fewer steps [{steps['low']:.2f}, {steps['high']:.2f}], "
    assert result["headline"].startswith(text) and text.split(":")[0].replace("'", "&#x27;") in page
    assert text in capsys.readouterr().out
    assert result["warnings"] == [] and result["verdict"]["comparable"]
    with Image.open(tmp_path / "report" / "headline.png") as picture:
        assert picture.size == (1200, 720) and len(picture.getcolors(1 << 20)) > 50
    assert "http" not in page.split("</script>")[-1] and page.count('src="data:image/png;base64') == 6


def test_a_protected_difference_refuses_the_speed_up(tmp_path):
    runs = two(tmp_path, theirs={"words": ("optimizer.learning_rate=2e-4",)})
    result, page = compare(tmp_path / "report", runs)
    assert result["headline"].startswith("NOT COMPARABLE: optimizer.learning_rate differs")
    assert "<strong>NOT COMPARABLE</strong>" in page and no_speed_up(page, result)
    result, page = compare(tmp_path / "allowed", runs, "--allow", "optimizer.learning_rate")
    assert "2.00 times fewer steps" in result["headline"] and "NOT COMPARABLE" not in page
    assert any("allowed by --allow" in warning for warning in result["warnings"])


def test_another_evaluator_refuses_its_metric(tmp_path):
    runs = two(tmp_path, theirs={"protocol": {"sampler": "ode"}})
    result, page = compare(tmp_path / "report", runs)
    assert result["headline"].startswith("NOT COMPARABLE: evaluator.sampler differs") and no_speed_up(page, result)
    result, _ = compare(tmp_path / "allowed", runs, "--allow", "evaluator.sampler")
    assert "times fewer steps" in result["headline"]


@pytest.mark.parametrize("extractor", ["dinov2-vit-l", "dinov2-reg-vit-b", "dinov2-vit-b"])
def test_a_circular_metric_gives_no_speed_up(tmp_path, extractor):
    runs = two(tmp_path, metric="fd_dinov2", protocol={"extractor": extractor})
    result, page = compare(tmp_path / "report", runs, "--allow", "evaluator.extractor")
    assert "No verdict" in result["headline"] and "circular" in result["headline"] and no_speed_up(page, result)
    assert "<b>Circular.</b>" in page and result["metrics"]["fd_dinov2_n50000"]["curves"], "it is shown"


def test_a_circular_metric_leaves_the_headline_to_another(tmp_path):
    from repa_scale import evaluations

    runs = two(tmp_path, metric="fd_dinov2", protocol={"extractor": "dinov2-vit-l"})
    for run in runs:
        for one in evaluations.read(run):
            kid = one.value / 1000
            evaluations.append(run, evaluations.Evaluation(one.step, 1, 0.0, "kid_effnet", kid, 2000, None, None,
                                                           {"extractor": "effnet-lite0"}))  # fmt: skip
    result, page = compare(tmp_path / "report", runs)
    assert "final KID (effnet, 2,000 samples)" in result["headline"] and "<b>Circular.</b>" in page
    with pytest.raises(DataError, match=r"--metric fid .* they have kid_effnet_n2000, fd_dinov2_n50000"):
        compare(tmp_path / "other", runs, "--metric", "fid")


def test_a_level_that_was_not_reached_is_more_than(tmp_path):
    runs = two(tmp_path, theirs={"steps": EVALUATED[:8]})  # the baseline stops at 200,000
    result, page = compare(tmp_path / "report", runs)
    own = result["metrics"]["fid_n50000"]["targets"]["repa"][1]
    assert own["baseline"] == {"kind": "more than", "step": 200_000} and own["axes"]["steps"]["kind"] == "more than"
    assert "more than 200,000" in page
    swift = [write_run(tmp_path / "swift", "repa", curve=lambda step: quality(40 * step)), runs[1]]
    result, page = compare(tmp_path / "second", swift)
    assert "by 25,000 steps, its first evaluation: more than 8.00 times fewer steps" in result["headline"]
    slow = [write_run(tmp_path / "slow", "repa", curve=lambda step: quality(step / 4)), runs[1]]
    result, _ = compare(tmp_path / "third", slow)
    assert "does not reach the baseline's final FID (50,000 samples)" in result["headline"]
    assert "more than 2.00 times more steps" in result["headline"]


def test_one_seed_has_no_interval_and_an_equal_one_no_proof(tmp_path, sweep):
    result, _ = compare(tmp_path / "one", two(tmp_path))
    assert "One seed of a method: no interval" in result["headline"]
    same = write_pair(tmp_path / "same", ratio=1.0)
    result, _ = compare(tmp_path / "report", same)
    assert "The interval holds 1: no difference is shown." in result["headline"]


def test_other_hardware_leaves_the_steps_but_not_the_times(tmp_path):
    result, page = compare(tmp_path / "report", two(tmp_path, theirs={"tags": {"device": "NVIDIA A100"}}))
    assert "2.00 times fewer steps" in result["headline"] and "less time" not in result["headline"]
    axes = result["metrics"]["fid_n50000"]["targets"]["repa"][0]["axes"]
    assert set(axes) == {"steps", "samples", "flops"} and "Times are not compared" in page


def test_a_run_that_goes_on_has_no_verdict(tmp_path):
    result, page = compare(tmp_path / "report", two(tmp_path, ours={"state": "running"}))
    assert "repa is still running" in result["headline"] and no_speed_up(page, result)
    assert any("still running" in warning for warning in result["warnings"])


def test_runs_without_an_evaluation_show_their_losses(tmp_path):
    result, page = compare(tmp_path / "report", two(tmp_path, steps=()))
    assert "the denoising loss is" in result["headline"] and "No verdict: no run was evaluated" in result["headline"]
    assert no_speed_up(page, result)


def test_a_sweep_over_weights_is_one_curve_each(tmp_path):
    runs = two(tmp_path)
    runs.append(
        write_run(tmp_path / "heavy", "repa", curve=lambda s: quality(3 * s), words=("alignment.repa.weight=1.0",))
    )
    result, _ = compare(tmp_path / "report", runs)
    assert list(result["variants"]) == ["repa-weight-0.5", "repa-weight-1.0", "baseline"]
    assert "REPA weight=0.5 reaches" in result["headline"] and "REPA weight=1.0 reaches" in result["headline"]


def test_published_points_stand_beside_a_fid_alone(tmp_path):
    runs = two(tmp_path, words=("data.image_size=256",))
    result, page = compare(tmp_path / "report", runs, "--against", "published")
    points = {(point["method"], point["fid"]): point["ours"] for point in result["published"]["points"]}
    assert points["baseline", 33.0]["fid"] == pytest.approx(quality(400_000)) and points["repa", 24.4] is not None
    assert "Published points" in page
    runs = two(tmp_path / "small", count=2000)
    result, _ = compare(tmp_path / "other", runs, "--against", "published")
    assert "no FID of 50,000 samples" in result["published"]["why"]
    assert all(point["ours"] is None for point in result["published"]["points"])


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    runs = two(tmp_path)

    def refused(*words):
        assert main(["compare", "--out", str(tmp_path / "report"), *map(str, words)]) == 64
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        return lines[0]

    assert "one run cannot be compared" in refused("--runs", runs[0])
    assert "holds no config.yaml" in refused("--runs", runs[0], tmp_path)
    other = write_run(tmp_path / "large", "baseline", words=("model.name=SiT-L/2",))
    assert "different models: SiT-B/2 (repa), SiT-L/2 (large)" in refused("--runs", runs[0], other)
    assert "did you mean 'optimizer.learning_rate'" in refused("--runs", *runs, "--allow", "optimizer.learning_rat")
    assert "is not among the runs' evaluations; they have fid_n50000" in refused("--runs", *runs, "--metric", "kid")
    twice = write_run(tmp_path / "twice", "repa")
    assert "are all REPA with seed 0" in refused("--runs", *runs, twice)
    (twice / "metrics.jsonl").write_text("")
    assert "has no metrics yet" in refused("--runs", twice, runs[1])
    (twice / "config.yaml").write_text("a: [")
    assert "is damaged" in refused("--runs", twice, runs[1])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("scheme", [0, pytest.param(1, marks=pytest.mark.long)], ids=["dark", "light"])
def test_the_page_in_a_browser(sweep, tmp_path, scheme):
    """Charts are drawn without a network, on a background of the reader's scheme."""
    from shutil import which

    if not (browser := which("chromium")):
        pytest.skip("no chromium")
    compare(tmp_path / "report", sweep)
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    words += f" --disable-component-update --disable-sync --user-data-dir={tmp_path}/profile --window-size=1200,900"
    words += f" --virtual-time-budget=8000 --blink-settings=preferredColorScheme={scheme}"
    page = (tmp_path / "report" / "index.html").as_uri()
    command = [browser, *words.split(), f"--screenshot={tmp_path}/page.png", page]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / "page.png") as shot:
        colours = {colour: count for count, colour in shot.convert("RGB").getcolors(1 << 24)}
    paper = max(colours, key=colours.get)
    assert (sum(paper) > 700) == bool(scheme)
    blue, orange = (31, 138, 184), (217, 105, 43)
    assert colours.get(blue, 0) > 200 and colours.get(orange, 0) > 200, "no curve was drawn"
