"""identity.py and stored_values.py: what makes a run another run, and how a run of an older version goes on."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import EXACT
from starts import add_key

from repa_scale import config as schema
from repa_scale.compare.run_data import configuration
from repa_scale.compose import Origin, compose, compose_with_origin, resolved_yaml
from repa_scale.config import added, from_dict, value_before
from repa_scale.errors import ConfigError
from repa_scale.identity import differing, identity_hash, identity_keys, pair_id, settings, term_settings
from repa_scale.run_folder import read_metrics, stored_identity
from repa_scale.stored_values import with_stored_values

TESTS = Path(__file__).parent
OLD = TESTS / "run_v1"  # a run of commit e9d8345: its folder, its data, the next two steps, and the keys of that commit
# What it was started with.
WORDS = [
    "experiment=demo_repa", "model.name=SiT-Pico/2", "alignment.repa.depth=1", "alignment.repa.projector_dim=8",
    "alignment.repa.weight=0.25", "optimizer.warmup_steps=2", "optimizer.eps=1e-7", "ema.decay=0.9",
    "train.global_batch=8",
]  # fmt: skip
FREE = ["train.log_every=1", "data.workers=0", "tracking.uri=none", f"data.path={OLD / 'data'}"]


def keys(*argv: str, data: str = "data") -> dict:
    return identity_keys(compose(["experiment=demo_repa", *argv]), data)


@pytest.mark.parametrize(
    "override",
    [
        "method=baseline",
        "seed=1",
        "model.name=SiT-Nano/1",
        "model.class_dropout=0.2",
        "data.image_size=16",
        "latents.name=taesd",
        "latents.weights=random",
        "interpolant.path=cosine",
        "alignment.repa.depth=2",
        "alignment.repa.weights=other.safetensors",
        "alignment.more.weight=1",
        "optimizer.learning_rate=4e-3",
        "optimizer.betas=[0.9,0.99]",
        "optimizer.warmup_steps=5",
        "ema.decay=0.9",
        "train.global_batch=32",
        "train.precision=bf16",
        "train.init_from=weights.safetensors",
    ],
)
def test_identity_keys_change_the_hash(override):
    assert identity_hash(keys(override)) != identity_hash(keys())


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=7",
        "train.micro_batch=2",
        "train.log_every=1",
        "train.checkpoint_every=9",
        "train.sample_every=3",
        "train.device=cpu",
        "train.activation_checkpointing=true",
        "train.compile=true",
        "data.workers=0",
        "data.path=/moved",
        "run.dir=/moved",
        "run.name=renamed",
        "sample.steps=3",
        "tracking.uri=none",
        "alignment.kernel=torch",
        "deepspeed.config=my.json",
    ],
)
def test_free_keys_do_not(override):
    assert keys(override) == keys()


def test_the_data_count_and_folders_do_not():
    assert identity_hash(keys(data="other")) != identity_hash(keys())
    assert keys("train.init_from=/a/w.safetensors") == keys("train.init_from=/b/w.safetensors")


def test_a_run_finds_its_baseline():
    baseline = identity_keys(compose(["experiment=demo_baseline", "seed=9"]), "data")
    assert pair_id(baseline) == pair_id(keys()) != pair_id(keys("optimizer.learning_rate=4e-3"))
    assert identity_hash(baseline) != identity_hash(keys())
    assert not [key for key in baseline if key.startswith("alignment")]


def test_the_hash_survives_json():
    assert identity_hash(json.loads(json.dumps(keys()))) == identity_hash(keys())
    assert len(identity_hash(keys())) == 16


def test_differing_names_each_key():
    lines = differing(keys(), keys("seed=1", "ema.decay=0.9"))
    assert lines == ["ema.decay: 0.99 -> 0.9", "seed: 0 -> 1"]
    assert differing(keys(), keys()) == []
    baseline = keys("method=baseline")
    assert "alignment.repa.depth: 3 -> absent" in differing(keys(), baseline)


# Keys that come after a run began.


@pytest.fixture
def later_version():
    """`add_key`, undone after the test."""
    before = {cls: dict(vars(cls)) for cls in vars(schema).values() if dataclasses.is_dataclass(cls)}
    annotations = {cls: dict(cls.__annotations__) for cls in before}
    yield add_key
    for cls, attributes in before.items():
        for name in set(vars(cls)) - set(attributes):
            delattr(cls, name)
        for name, value in attributes.items():
            if vars(cls).get(name) is not value:
                setattr(cls, name, value)
        cls.__annotations__.clear()
        cls.__annotations__.update(annotations[cls])


def undeclared() -> list[str]:
    """What is wrong with the identity keys, compared with those of the first release."""
    every = ["~alignment.repa", "alignment.NAME.depth=1", "data.source=moments+tokens", "data.flip=true"]
    config = compose([*every, "health.leave_out=1"])
    now, then = set(identity_keys(config, "")), set(json.loads((OLD / "keys.json").read_text())["identity"])
    declared = {
        key for key, _, field in (*settings(config), *term_settings(config))
        if value_before(field) is not dataclasses.MISSING
    }  # fmt: skip
    lines = [
        f"{key} is a new identity key: declare it in config.py with added(DEFAULT, before=VALUE), where VALUE is what "
        "runs did before it existed; else every older run is refused"
        for key in sorted(now - then - declared)
    ]
    return lines + [f"{key} was an identity key: without it older runs are refused" for key in sorted(then - now)]


def test_every_identity_key_is_of_the_first_release_or_says_what_was_before(later_version):
    assert undeclared() == []
    later_version("TermConfig", "kind", added("huber", before="cosine"))
    assert undeclared() == []
    later_version("ModelConfig", "residual", "weights")
    assert [line.partition(" ")[0] for line in undeclared()] == ["model.residual"]


def test_a_new_key_leaves_the_hash_of_what_behaves_as_before(later_version):
    before = keys(), keys("method=baseline")
    later_version("TermConfig", "kind", added("huber", before="cosine"))
    later_version("ModelConfig", "residual", added("plain", before="plain"))
    assert keys("alignment.repa.kind=cosine") == before[0] and keys("method=baseline") == before[1]
    assert keys()["alignment.repa.kind"] == "huber" and "model.residual" not in keys()
    assert identity_hash(keys()) != identity_hash(before[0]) and pair_id(keys()) == pair_id(before[0])
    assert differing(before[0], keys()) == ['alignment.repa.kind: "cosine" -> "huber"']
    assert differing(keys("model.residual=weights"), before[0])[1:] == ['model.residual: "weights" -> "plain"']


def test_what_was_stored_without_a_key_is_read_as_it_was_meant(later_version, tmp_path):
    """Checkpoints, exports, MLflow's parameters and RUN/config.yaml; but not a file that a user wrote."""
    stored = json.loads(next(OLD.glob("run/checkpoints/*/manifest.json")).read_text())["config"]
    file = tmp_path / "mine.yaml"
    file.write_text("method: repa\nalignment: {repa: {depth: 3}}\n")
    later_version("TermConfig", "kind", added("huber", before="cosine"))
    later_version("ModelConfig", "residual", added("weights", before="none"))
    later_version("SampleConfig", "order", added("second", before="first"))
    flat = {"model.name": "SiT-B/2", "alignment.repa.depth": "3", "method": "repa"}
    repeated = compose(["--config", str(OLD / "run" / "config.yaml"), "model.name=SiT-B/2"])
    for config in (from_dict(stored), configuration(flat), repeated):
        found = config.alignment["repa"].kind, config.model.residual, config.sample.order
        assert found == ("cosine", "none", "first")
    mine = compose(["--config", str(file)])
    assert (mine.alignment["repa"].kind, mine.model.residual, mine.sample.order) == ("huber", "weights", "second")


def kept(stored: dict, *argv: str) -> tuple[list[str], list[str]]:
    """The keys taken from a stored run, and the differences that remain."""
    config, origin = compose_with_origin(list(argv))
    resumed, lines = with_stored_values(config, stored, origin)
    return [line.partition(":")[0] for line in lines], differing(stored, identity_keys(resumed, "data"))


def test_a_value_that_nobody_asked_for_is_the_runs_own(tmp_path):
    started = ["experiment=demo_repa", "optimizer.eps=1e-7", "data.flip=true", "data.source=moments+tokens"]
    stored = identity_keys(compose(started), "data")
    assert kept(stored, "experiment=demo_repa")[1] == []
    taken, left = kept(stored, "experiment=demo_repa", "optimizer.clip=2")
    assert taken == ["alignment.stored_tokens", "data.flip", "data.stored_moments", "optimizer.eps"]
    assert left == ["optimizer.clip: 1.0 -> 2.0"]
    assert kept(stored)[1] == [] and "model.name" in kept(stored)[0], "no preset: every value is the run's own"
    assert kept(stored, "experiment=demo_baseline")[1][-1] == 'method: "repa" -> "baseline"', "a preset sets it"
    assert kept(stored, "data.flip=false")[1] == ["data.flip: true -> false"]
    assert kept(stored, "data.source=image")[1][-1] == "data.stored_moments: true -> false"
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {clip: 2.0}")
    assert kept(stored, "--config", str(file))[1] == ["optimizer.clip: 1.0 -> 2.0"]
    baseline = identity_keys(compose(["experiment=demo_baseline"]), "data")
    assert kept(baseline, "model.num_classes=10")[1] == []


def test_alignment_terms_are_the_runs_own_too(tmp_path):
    stored = identity_keys(compose(["experiment=demo_repa", "~alignment.repa", "alignment.deep.depth=2"]), "data")
    assert kept(stored, "experiment=demo_repa")[1] == []
    assert kept(stored, "experiment=demo_repa", "alignment.deep.depth=2")[1] == []
    assert kept(stored, "alignment.deep.depth=3")[1] == ["alignment.deep.depth: 2 -> 3"]
    assert "alignment.repa.depth: absent -> 3" in kept(stored, "experiment=demo_repa", "alignment.repa.weight=0.5")[1]
    assert "alignment.deep.depth: 2 -> absent" in kept(stored, "alignment.deep.depth=2", "~alignment.deep")[1]
    file = tmp_path / "mine.yaml"
    file.write_text("alignment: {repa: {depth: 3}}")
    assert "alignment.deep.depth: 2 -> absent" in kept(stored, "--config", str(file))[1]


def test_a_file_of_weights_must_be_named_again():
    """The run knows its name, not its folder."""
    stored = identity_keys(compose(["train.init_from=/a/w.safetensors", "alignment.repa.weights=/a/e.pth"]), "data")
    assert kept(stored) == (
        [],
        ['alignment.repa.weights: "e.pth" -> "hub"', 'train.init_from: "w.safetensors" -> ""'],
    )
    assert kept(stored, "train.init_from=/b/w.safetensors", "alignment.repa.weights=/b/e.pth")[1] == []


def test_what_was_asked_for_reaches_the_nodes(tmp_path):
    """`repa-scale launch` brings one frozen file to the nodes: its values are not all asked for."""
    from repa_scale.launch import _parser, make_plan

    words = ["experiment=demo_repa", "optimizer.clip=2", "~alignment.repa", "alignment.deep.depth=2", "run.dir=x"]
    plan = make_plan(_parser().parse_args(["--num_gpus", "2"]), words)
    file = tmp_path / "config.yaml"
    file.write_text(plan.config)
    config, origin = compose_with_origin(words)
    assert compose_with_origin(["--config", str(file)]) == (config, origin)
    assert origin.asked == {"optimizer.clip", "alignment.repa", "alignment.deep", "alignment.deep.depth", "run.dir"}
    assert "optimizer.learning_rate" in origin.preset and "optimizer.eps" not in origin.preset | origin.asked
    file.write_text("# origin: {}\n" + resolved_yaml(config))
    with pytest.raises(ConfigError, match="# origin: is damaged"):
        compose(["--config", str(file)])
    assert Origin(frozenset({"seed"}), frozenset()).as_line() == '# origin: {"asked": ["seed"], "preset": []}\n'


def test_the_identity_of_a_folder(tmp_path):
    identity = json.loads((OLD / "run" / "identity.json").read_text())
    assert stored_identity(tmp_path) is None and stored_identity(OLD / "run") == identity
    assert identity_hash(identity["keys"]) == identity["identity_hash"]
    assert pair_id(identity["keys"]) == identity["pair_id"]
    run = tmp_path / "run"
    shutil.copytree(OLD / "run", run)
    (run / "identity.json").unlink()
    assert stored_identity(run) == identity, "of its newest checkpoint"
    (run / "checkpoints" / "step_00000004").mkdir()
    (run / "checkpoints" / "step_00000004" / "manifest.json").write_text("{")
    assert stored_identity(run) == identity


def identity_of(name: str) -> dict:
    identity = json.loads((OLD / "run" / "identity.json").read_text())
    return {**identity, "identity_hash": "0123456789abcdef"} if name == "late" else identity


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Real starts on copies of the old run: {name: (run folder, exit code, what it printed)}."""
    folder = tmp_path_factory.mktemp("old")
    kind = ["TermConfig", "kind", "huber", "cosine"]
    plan = {
        "as it was": {"words": [*WORDS, "train.steps=5"]},
        "without its words": {"words": ["train.steps=4"]},
        "with a later key": {"words": [*WORDS, "train.steps=4"], "key": kind},
        "late": {"words": [*WORDS, "train.steps=4"], "stale": True},
        "another value": {"words": [*WORDS, "train.steps=4", "alignment.repa.kind=huber"]},
        "new": {"words": [*WORDS, "train.steps=1"]},
    }
    starts = []
    for name, start in plan.items():
        run = folder / name.replace(" ", "_")
        if name != "new":
            shutil.copytree(OLD / "run", run)
        if name == "late":  # a hash that no keys give is kept as well
            (run / "identity.json").write_text(json.dumps(identity_of("late")))
        starts.append({**start, "words": [*start["words"], *FREE, f"run.dir={run}"]})
    (folder / "plan.json").write_text(json.dumps(starts))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, TESTS / "starts.py", folder / "plan.json", folder / "results.json"]
    subprocess.run(command, check=True, timeout=200, cwd=folder, env=environment)
    results = json.loads((folder / "results.json").read_text())
    return {
        name: (folder / name.replace(" ", "_"), result["code"], result["errors"])
        for name, result in zip(plan, results, strict=True)
    }


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["as it was", "without its words", "with a later key", "late"])
def test_a_run_of_the_first_release_goes_on(started, name):
    """With the same losses, whatever keys came since, and under its own hash."""
    run, code, said = started[name]
    assert code == 0, said
    rows = [row for row in read_metrics(run) if row["step"] > 3]
    wanted = json.loads((OLD / "next.json").read_text())[: len(rows)]
    assert rows and [row["step"] for row in rows] == [row["step"] for row in wanted]
    for row, expected in zip(rows, wanted, strict=True):
        for key in EXACT:
            near = expected[key] if isinstance(expected[key], str) else pytest.approx(expected[key], rel=1e-4)
            assert row[key] == near, (row["step"], key)
    identity = identity_of(name)
    assert json.loads((run / "identity.json").read_text()) == identity
    newest = max(run.glob("checkpoints/*/manifest.json"))
    manifest = json.loads(newest.read_text())
    assert manifest["step"] == rows[-1]["step"] and manifest["identity"] == identity["keys"]
    assert (manifest["identity_hash"], manifest["pair_id"]) == (identity["identity_hash"], identity["pair_id"])
    assert f"# pair_id: {identity['pair_id']}" in (run / "config.yaml").read_text()


@pytest.mark.distributed
def test_the_log_tells_which_values_are_the_runs_own(started):
    line = "resuming with stored values instead of defaults: "
    assert line not in started["as it was"][2] and line not in started["new"][2]
    assert 'model.name: "SiT-XL/2" -> "SiT-Pico/2"' in started["without its words"][2]
    for name in ("with a later key", "late"):
        run, _, said = started[name]
        assert f'{line}alignment.repa.kind: "huber" -> "cosine"\n' in said
        assert 'kind: "huber"' in (run / "log" / "rank_0.log").read_text()
        assert "kind: cosine" in (run / "config.yaml").read_text()


@pytest.mark.distributed
def test_another_value_of_a_later_key_is_refused(started):
    run, code, said = started["another value"]
    assert code == 64 and said.count("\n") == 1, said
    assert said.startswith("repa-scale: error: ") and 'here): alignment.repa.kind: "cosine" -> "huber"; ' in said
    before = {path.relative_to(OLD / "run"): path.read_bytes() for path in OLD.glob("run/**/*") if path.is_file()}
    assert before == {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.distributed
def test_a_new_run_has_todays_default_and_names_it(started):
    run, code, said = started["new"]
    assert code == 0, said
    new, old = (json.loads((folder / "identity.json").read_text()) for folder in (run, OLD / "run"))
    assert new["keys"] == {**old["keys"], "alignment.repa.kind": "huber"}
    assert new["pair_id"] == old["pair_id"] and new["identity_hash"] != old["identity_hash"]
