"""Evaluation during training: its value by an independent calculation, over ranks, resumes and stops; in MLflow."""

import json
import shutil

import numpy as np
import pytest
import torch
from launching import SMALL, Launch, train

from repa_scale import evaluations
from repa_scale.data.batches import decode, open_dataset
from repa_scale.errors import ConfigError
from repa_scale.extractors import build_extractor
from repa_scale.latents import build_latents
from repa_scale.rng import permutation
from repa_scale.run_folder import read_metrics, read_status
from repa_scale.sampling import sample_numbered
from repa_scale.trained import load_trained

COUNT, REAL = 12, 20
WORDS = [*SMALL, "train.steps=4", "evaluate.every=2", f"evaluate.count={COUNT}", f"evaluate.reference_count={REAL}"]
WORDS += ["sample.batch=5", "train.checkpoint_every=2", "seed=3"]


@pytest.fixture(scope="module")
def ran(digits, tmp_path_factory):
    """A run with two evaluations, tracked in a store and in TensorBoard."""
    folder = tmp_path_factory.mktemp("online")
    words = [*WORDS, f"data.path={digits}", f"tracking.uri=sqlite:///{folder}/mlflow.db", "tracking.tensorboard=true"]
    train(words, folder / "run", 1, "alone")
    return folder / "run"


def distance_by_numpy(a, b):
    """|mean - mean|^2 + tr(A + B) - 2 tr sqrt(A B), by the eigenvalues of the product."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # Of rank n - 1 at most: the eigenvalues of A B are those of the small matrix X B X^T / (n - 1).
    x = (a - a.mean(0)) / np.sqrt(len(a) - 1)
    roots = np.sqrt(np.linalg.eigvalsh(x @ second @ x.T).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * roots


@pytest.mark.distributed
def test_the_value_is_that_of_an_independent_calculation(ran, digits):
    """From the checkpoint, without the trainer: the same samples, the real images, a Fréchet distance by numpy."""
    found = evaluations.read(ran)
    assert [(e.step, e.name, e.attempt, e.count) for e in found] == [
        (step, f"eval/fd_effnet_n{COUNT}", 1, COUNT) for step in (2, 4)
    ]
    dataset = open_dataset(digits)
    extractor = build_extractor("effnet-lite0")
    chosen = permutation(0, "reference images", 0, dataset.count)[:REAL].tolist()
    real = np.stack([decode(dataset.reader[i]["image"]) for i in chosen])
    real = extractor(torch.from_numpy(real).permute(0, 3, 1, 2)).numpy()
    for evaluation in found:
        trained = load_trained(ran / "checkpoints" / f"step_{evaluation.step:08d}")
        config, model = trained.config, trained.build()
        latents = build_latents(config, "cpu", torch.float32)
        index = torch.arange(COUNT)
        drawn = sample_numbered(
            lambda x, t, y, model=model: model(x, t, y)[0], index, index % 10, 10, (1, 8, 8), 0, config.sample, "linear"
        )
        sampled = extractor(latents.decode(drawn)).numpy()
        assert evaluation.value == pytest.approx(distance_by_numpy(sampled, real), rel=2e-3)
        assert evaluation.low < evaluation.value < evaluation.high
        protocol = evaluation.protocol
        assert protocol["reference_fingerprint"] == dataset.fingerprint and protocol["reference_count"] == REAL
        assert (protocol["sampler"], protocol["steps"], protocol["seed"]) == ("euler", 2, 0)
    assert found[0].value != found[1].value
    assert read_metrics(ran)[-1]["lost_evaluate_seconds"] > 0


@pytest.mark.distributed
def test_it_is_in_mlflow_and_tensorboard_once(ran):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from repa_scale.tracking import mlflow_client

    client = mlflow_client(f"sqlite:///{ran.parent}/mlflow.db")
    run_id = json.loads((ran / "mlflow.json").read_text())["run_id"]
    found = evaluations.read(ran)
    for part in ("", "_low", "_high"):
        wanted = [(e.step, e.points()[e.name + part], int(e.time * 1000)) for e in found]
        points = client.get_metric_history(run_id, found[0].name + part)
        assert [(p.step, p.value, p.timestamp) for p in points] == wanted
    tag = json.loads(client.get_run(run_id).data.tags[found[0].name])
    assert tag == {**found[-1].protocol, "low": found[-1].low, "high": found[-1].high}
    events = EventAccumulator(str(ran / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(found[0].name)] == [
        (e.step, e.value) for e in found
    ]


@pytest.mark.long
@pytest.mark.distributed
def test_a_run_stopped_in_an_evaluation_does_it_at_its_next_start(ran, digits, tmp_path):
    """On two processes, with the statistics that the other run left in the data set's folder."""
    (statistics,) = (digits / "statistics").iterdir()
    made = statistics.stat().st_mtime_ns
    words = [*WORDS, f"data.path={digits}"]
    start = Launch(words, tmp_path / "run", 2, FAULTS=json.dumps([["stop_in_sampling", 1, 1]]))
    start.wait()
    assert read_status(tmp_path / "run")["state"] == "preempted", start.text()
    assert evaluations.read(tmp_path / "run") == []
    train(words, tmp_path / "run", 2)
    found, alone = evaluations.read(tmp_path / "run"), evaluations.read(ran)
    assert [(e.step, e.attempt) for e in found] == [(2, 2), (4, 2)]
    for ours, theirs in zip(found, alone, strict=True):
        assert ours.protocol == theirs.protocol and ours.value == pytest.approx(theirs.value, rel=1e-3)
    assert statistics.stat().st_mtime_ns == made


@pytest.mark.distributed
def test_a_start_evaluates_what_is_missing_and_nothing_twice(ran, digits, tmp_path):
    """The last evaluation is taken out of a finished run, and half of a line left in its place, as by a kill."""
    run = tmp_path / "run"
    shutil.copytree(ran, run)
    first, last = (run / evaluations.FILE).read_text().splitlines(keepends=True)
    (run / evaluations.FILE).write_text(first + last[: len(last) // 2])
    train([*WORDS, f"data.path={digits}"], run, 1, "alone")
    assert (run / evaluations.FILE).read_text().startswith(first)
    (_, again), (_, before) = evaluations.read(run), evaluations.read(ran)
    assert (again.step, again.attempt, again.value, again.low) == (4, 2, before.value, before.low)
    assert len((run / evaluations.FILE).read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("evaluate.count=1", "evaluate.count=1 has no covariance"),
        ("evaluate.extractors=[effnet-lite1]", "did you mean 'effnet-lite0'"),
        ("evaluate.extractors=[]", "names none"),
        ("evaluate.extractors=[effnet-lite0,effnet-lite0=random]", "twice"),
        ("evaluate.reference=nowhere.npz", "is not a file"),
        ("evaluate.every=-1", "evaluate.every=-1 must be"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_loaded(word, part):
    from repa_scale.compose import compose
    from repa_scale.validation import validate

    with pytest.raises(ConfigError) as refused:
        validate(compose(["experiment=demo_repa", "data.path=x", "evaluate.every=2", word]), 1)
    assert part in str(refused.value) and "\n" not in str(refused.value)
