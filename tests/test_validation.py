"""validation.py: every rule has a message with the key, and the presets pass."""

import pytest

from repa_scale.compose import compose, presets
from repa_scale.errors import ConfigError
from repa_scale.validation import batch_split, validate


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_presets_are_valid(preset, world_size):
    validate(compose([f"experiment={preset}", "data.path=somewhere"]), world_size)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("method=repaa", ["method=repaa", "repa, baseline", "'repa'"]),
        ("run.resume=maybe", ["run.resume=maybe"]),
        ("interpolant.path=lineal", ["interpolant.path=lineal", "'linear'"]),
        ("interpolant.time=lognorm", ["'lognormal'"]),
        ("sample.sampler=eular", ["'euler'"]),
        ("train.precision=bf32", ["train.precision=bf32", "fp32, bf16, fp16"]),
        ("train.device=tpu", ["train.device=tpu"]),
        ("optimizer.schedule=cosin", ["'cosine'"]),
        ("optimizer.schedule=cosine", ["optimizer.schedule_steps"]),
        ("alignment.repa.schedule=linear", ["alignment.repa.schedule_steps"]),
        ("alignment.repa.schedule=line", ["'linear'"]),
        ("alignment.kernel=tritn", ["alignment.kernel=tritn", "'triton'"]),
        ("alignment.repa.normalize=layer", ["alignment.repa.normalize=layer"]),
        ("alignment.repa.time_weighting=x", ["alignment.repa.time_weighting=x"]),
        ("alignment.repa.projector=mpl", ["'mlp'"]),
        ("alignment.repa.projector_dim=0", ["alignment.repa.projector_dim=0"]),
        ("alignment.repa.encoder=dinov2-vit-bb", ["alignment.repa.encoder", "'dinov2-vit-b'"]),
        ("alignment.repa.weights=hubb", ["alignment.repa.weights=hubb", "'hub'"]),
        ("alignment.repa.weights=/absent/file.pth", ["/absent/file.pth", "does not exist"]),
        ("alignment.repa.depth=0", ["alignment.repa.depth=0", "1 to 6"]),
        ("alignment.repa.depth=7", ["alignment.repa.depth=7", "1 to 6", "SiT-Tiny/2"]),
        ("alignment.repa.weight=-1", ["alignment.repa.weight=-1"]),
        ("alignment.repa.stop_step=0", ["alignment.repa.stop_step=0"]),
        ("alignment.a-b.depth=1", ["alignment.a-b"]),
        ("~alignment.repa", ["method=baseline"]),
        ("latents.name=identiti", ["latents.name=identiti", "'identity'"]),
        ("latents.weights=/absent", ["latents.weights=/absent"]),
        ("data.path=", ["data.path", "repa-scale prepare"]),
        ("data.image_size=0", ["data.image_size=0"]),
        ("data.workers=-1", ["data.workers=-1"]),
        ("latents.name=sd-vae-ft-mse data.image_size=20", ["data.image_size=20", "8"]),
        ("model.name=SiT-Tiny/8 data.image_size=20", ["model.name=SiT-Tiny/8", "20"]),
        ("model.num_classes=-1", ["model.num_classes=-1"]),
        ("model.class_dropout=1.5", ["model.class_dropout=1.5"]),
        ("optimizer.learning_rate=0", ["optimizer.learning_rate"]),
        ("optimizer.learning_rate=.inf", ["optimizer.learning_rate"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas", "two"]),
        ("optimizer.betas=[0.9,1.0]", ["optimizer.betas"]),
        ("optimizer.clip=-1", ["optimizer.clip"]),
        ("optimizer.schedule=cosine optimizer.schedule_steps=5 optimizer.warmup_steps=5", ["optimizer.warmup_steps=5"]),
        ("ema.decay=1.0", ["ema.decay=1.0"]),
        ("ema.decay=.nan", ["ema.decay"]),
        ("train.steps=0", ["train.steps=0"]),
        ("train.log_every=0", ["train.log_every=0"]),
        ("train.global_batch=63", ["train.global_batch=63", "2 ranks", "train.global_batch=64"]),
        ("train.micro_batch=12", ["train.micro_batch=12", "32 samples", "train.micro_batch=8"]),
        ("train.micro_batch=0", ["train.micro_batch=0", "train.micro_batch=1"]),
        ("train.init_from=/absent", ["train.init_from=/absent"]),
        ("sample.interval=[0.5,0.2]", ["sample.interval"]),
        ("sample.steps=0", ["sample.steps=0"]),
        ("seed=-1", ["seed=-1"]),
        ("tracking.uri=", ["tracking.uri"]),
        ("tracking.uri=https://me:secret@host", ["tracking.uri", "MLFLOW_TRACKING_PASSWORD"]),
        ("deepspeed.config=/absent.json", ["deepspeed.config=/absent.json"]),
    ],
)
def test_a_broken_rule_is_answered_in_one_line(override, parts):
    config = compose(["experiment=demo_repa", "data.path=somewhere", *override.split()])
    with pytest.raises(ConfigError) as caught:
        validate(config, 2)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message and "secret" not in message, message


def test_a_baseline_needs_no_term():
    argv = ["experiment=demo_baseline", "data.path=x", "alignment.repa.encoder=unknown"]
    validate(compose(argv), 1)
    validate(compose([*argv, "~alignment.repa"]), 1)


@pytest.mark.parametrize(("world", "micro", "expected"), [(1, None, (64, 1)), (2, 8, (8, 4)), (4, 16, (16, 1))])
def test_the_batch_is_split(world, micro, expected):
    config = compose(["experiment=demo_repa", f"train.micro_batch={'null' if micro is None else micro}"])
    assert batch_split(config, world) == expected
