"""identity.py: what makes a run another run, and what does not."""

import json

import pytest

from repa_scale.compose import compose
from repa_scale.identity import differing, identity_hash, identity_keys, pair_id


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
