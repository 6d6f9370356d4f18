"""A training step as on a GPU, on the `meta` device: no tensor of another device, and no wait beyond the table's.

What it cannot see: values, and what happens inside DeepSpeed. Attention counts as the matrix products and the softmax
that it is on `meta`; on a GPU it is one launch.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from meta_allowed import ALLOWED, LAUNCHES, WAITS
from meta_device import META, Watched
from meta_run import meta_run
from test_threads import assert_handed_over

from repa_scale import engine, state, trainer
from repa_scale.deepspeed_config import packaged_file
from repa_scale.draws import draw
from repa_scale.models.sit import SiT

REPA = ["experiment=demo_repa", "model.name=SiT-Nano/2", "alignment.repa.depth=1", "alignment.repa.weights=random"]
BASELINE = ["experiment=demo_baseline", "model.name=SiT-Nano/2"]
DINO = ["alignment.repa.encoder=dinov2-vit-s", "alignment.repa.projector=conv"]
SECOND = [
    f"+alignment.second.{word}"
    for word in (
        "encoder=effnet-lite0",
        "weights=random",
        "depth=2",
        "stop_step=2",
        "schedule=cosine",
        "schedule_steps=9",
    )
]
STEPS = {
    "bf16": (REPA, "torch"),
    "fp16": ([*REPA, "train.precision=fp16", "alignment.repa.normalize=layernorm"], "torch"),
    "fp32": ([*REPA, "train.precision=fp32", "alignment.repa.normalize=spatial"], "torch"),
    "bf16, Triton": ([*REPA, *DINO, "alignment.repa.normalize=layernorm"], "triton"),
    "fp16, Triton": ([*REPA, "train.precision=fp16", "alignment.repa.time_weighting=noise"], "triton"),
    "fp32, Triton": ([*REPA, "train.precision=fp32", "alignment.repa.normalize=spatial"], "triton"),
    "two terms": ([*REPA, *SECOND, "interpolant.path=cosine", "interpolant.time=lognormal"], "torch"),
    "micro batches": ([*REPA, "train.micro_batch=4", "train.activation_checkpointing=true"], "torch"),
    "skipped spikes": ([*REPA, "health.on_spike=skip", "alignment.repa.projector=linear"], "torch"),
    "baseline, bf16": (BASELINE, "torch"),
    "baseline, fp16": ([*BASELINE, "train.precision=fp16"], "torch"),
    "baseline, fp32": ([*BASELINE, "train.precision=fp32"], "torch"),
    "stage 1": ([*REPA, "stage=1"], "torch"),
    "stage 2, fp16": ([*BASELINE, "stage=2", "train.precision=fp16"], "torch"),
}
used: set[tuple[str, str]] = set()  # rows of the table that a test of this file has met


@pytest.fixture
def run(tmp_path, digits):
    """A maker of runs: words of the command line -> meta_run."""

    def made(words, kernel="torch", **settings):
        stages = [word[-1] for word in words if word.startswith("stage=")]
        words = ["train.precision=bf16", "train.global_batch=8", *(w for w in words if not w.startswith("stage="))]
        for stage in stages:
            file = tmp_path / "deepspeed.json"
            file.write_text(packaged_file().read_text().replace('"stage": 3', f'"stage": {stage}'))
            words.append(f"deepspeed.config={file}")
        return meta_run(tmp_path / "run", digits, words, kernel, **settings)

    return made


def check(notes: Counter) -> None:
    """Everything noted is a row of the table."""
    wrong = sorted(set(notes) - set(ALLOWED))
    assert not wrong, "\n".join(f"{where}: {kind}" for kind, where in wrong)
    used.update(notes)


@pytest.mark.parametrize("case", STEPS)
def test_a_step_stays_on_the_device(case, run):
    words, kernel = STEPS[case]
    with run(words, kernel) as one:
        for number in (1, 2):
            one.step(one.batch(8), number)
        check(one.watched.notes)
        triton = {name for phase in one.watched.launches.values() for name in phase if "loss" in name}
        assert bool(triton & {"cosine_loss", "projector_loss"}) == (kernel == "triton"), triton


def test_the_papers_step_launches_no_more_than_it_did(run, record_property):
    """SiT-XL/2, 32 images of 256 px, DINOv2-B and the VAE in the step: operations by phase, and waits."""
    words = [
        "experiment=repa_sit_xl",
        "latents.weights=random",
        "alignment.repa.weights=random",
        "train.global_batch=32",
    ]
    with run(words) as one:
        one.step(one.batch(32))
        found = {phase: sum(one.watched.launches[phase].values()) for phase in LAUNCHES}
        waits = one.watched.notes
    for what, counts in (("operations", found), ("waits", {" ".join(key): count for key, count in waits.items()})):
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        record_property("summary", f"{what} of a step of SiT-XL/2 on meta: {listed}")
    assert {phase: count for phase, count in found.items() if count > LAUNCHES[phase]} == {}
    assert dict(waits) == WAITS
    check(waits)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_sampling_stays_on_the_device(sampler, run):
    words = [*REPA, f"sample.sampler={sampler}", "sample.steps=3", "sample.count=4", "sample.interval=[0.0,0.7]"]
    with run(words) as one:
        one.trainer.sample(1)
        check(one.watched.notes)
        assert sum(one.watched.launches["sample"].values()) > 100


def test_online_evaluation_stays_on_the_device(run):
    words = [*BASELINE, "evaluate.every=1", "evaluate.count=8", "evaluate.reference_count=8", "sample.steps=2",
             "evaluate.extractors=[effnet-lite0=random]"]  # fmt: skip
    with run(words) as one:
        one.trainer.evaluate(1)
        check(one.watched.notes)


def test_a_save_copies_into_pinned_memory(run):
    with run([*REPA, "checkpoint.asynchronous=false"]) as one:
        one.trainer.save(1, wait=True)
        check(one.watched.notes)
        assert one.watched.notes == {("wait", "saving._copy"): 1, ("read", "engine.optimizer_steps"): 1}


def test_batches_are_copied_behind_the_training(run):
    """No thread waits for a copy: the training's stream does, on the device, and the memory waits for the training."""
    with run([*BASELINE, "data.workers=1", "train.steps=3"]) as one:
        for step, batch in one.trainer.batches(0):
            losses, outcome = one.trainer.step(step, batch)
            one.trainer.record(step, losses, outcome, batch)
            assert_handed_over(batch, step)
        check(one.watched.notes)
        assert not [where for where in one.watched.notes if where[0] == "wait" and where[1].startswith("data.")]
        assert one.watched.contexts == {META}  # else each rank of a node takes memory of its GPU 0


def test_stored_features_stay_on_the_device(run):
    words = ["experiment=repa_sit_b", "latents.weights=random", *DINO[:1], "alignment.repa.weights=random"]
    with run(words) as one:
        batch = one.batch(2)
        noise = draw(0, 1, batch.index, (4, 32, 32))
        moments = torch.empty(2, 8, 32, 32, device=META)
        assert one.trainer.frozen.clean(batch.images, noise.posterior, {"moments": moments}).device == META
        check(one.watched.notes)


# That the tests above can fail: with either fix taken out, no step comes through.


def test_a_buffer_on_the_host_is_an_error(run, monkeypatch):
    monkeypatch.setattr(engine, "place", lambda *_: None)
    with run(REPA) as one, pytest.raises(RuntimeError, match="device"):
        one.step(one.batch(8))


def test_a_constant_that_zero_init_leaves_on_the_host_is_an_error(run, monkeypatch):
    """It sends what eight constructors of torch make to the device, and nothing else; `place` moves buffers alone."""
    build, forward = SiT.__init__, SiT.forward

    def built(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.gain = torch.linspace(1, 2, 1)

    monkeypatch.setattr(SiT, "__init__", built)
    monkeypatch.setattr(SiT, "forward", lambda self, x, *rest: forward(self, x * self.gain, *rest))
    with run(REPA) as one, pytest.raises(RuntimeError, match="device"):
        one.step(one.batch(8))


@pytest.mark.parametrize("name", ["mm", "embedding", "conv2d", "gather", "mul_"])
def test_what_cuda_refuses_and_meta_lets_pass_is_an_error(name):
    """With a constant that a network or the EMA made on the host when it was built; nothing is computed there later."""
    on_host = {"gather": torch.zeros(2, 2, dtype=torch.int64)}.get(name, torch.zeros(2, 2, 2, 2))
    device = torch.zeros(2, 2, 2, 2, device=META)
    uses = {
        "mm": lambda: device[0, 0].mm(on_host[0, 0]),
        "embedding": lambda: torch.nn.functional.embedding(device[0, 0].long(), on_host[0, 0]),
        "conv2d": lambda: torch.nn.functional.conv2d(device, on_host),
        "gather": lambda: device[0, 0].gather(0, on_host),
        "mul_": lambda: device.mul_(on_host),
    }
    uses[name]()  # what this test is about
    with Watched({}), pytest.raises(RuntimeError, match="same device"):
        uses[name]()


def test_a_number_on_the_host_among_the_losses_is_an_error(run, monkeypatch):
    reduce = trainer.reduce_step
    monkeypatch.setattr(
        trainer, "reduce_step", lambda ranks, means, *rest: reduce(ranks, [torch.tensor(0.0), *means], *rest)
    )
    with run(REPA) as one, pytest.raises(RuntimeError, match="device"):
        one.step(one.batch(8))


def test_a_read_that_the_table_does_not_have_is_an_error(run, monkeypatch):
    update = trainer.ShardEma.update
    monkeypatch.setattr(trainer.ShardEma, "update", lambda self: (update(self), float(self.values[0][0])))
    with run(REPA) as one:
        one.step(one.batch(8))
        with pytest.raises(AssertionError, match="read"):
            check(one.watched.notes)


def test_initial_values_made_on_the_host_are_an_error(run, monkeypatch):
    with run(BASELINE, start=True) as one:
        check(one.watched.notes)
    make = state.initial_values
    monkeypatch.setattr(state, "initial_values", lambda *words: make(*words[:5]))
    with run(BASELINE, start=True) as one, pytest.raises(AssertionError, match="host"):
        check(one.watched.notes)


def test_every_row_of_the_table_is_met(request):
    """The last of this file: a row that nothing meets any more has to go."""
    if request.config.option.keyword or any("::" in word for word in request.config.invocation_params.args):
        pytest.skip("not all tests of this file were run")
    assert sorted(set(ALLOWED) - used) == []
