"""Checks a configuration before anything is loaded: each message has the value, the rule and the remedy. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from repa_scale.config import Config, TermConfig
from repa_scale.errors import ConfigError, did_you_mean
from repa_scale.quantities import share, size_in_bytes
from repa_scale.sizes import ENCODERS, PROJECTORS, backbone, latent_spec, token_grid
from repa_scale.windows import parse_windows

CHOICES = {
    "method": ("repa", "baseline"),
    "data.decoder": ("auto", "dali", "pillow"),
    "data.source": ("image", "moments", "moments+tokens"),
    "run.resume": ("auto", "never"),
    "interpolant.path": ("linear", "cosine"),
    "interpolant.time": ("uniform", "lognormal"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "train.precision": ("fp32", "bf16", "fp16"),
    "train.device": ("auto", "cuda", "cpu"),
    "checkpoint.best": ("", "loss", "denoising_loss", "alignment_loss"),
    "health.on_spike": ("log", "skip", "rollback"),
    "sample.sampler": ("euler", "heun", "sde"),
}
KERNELS = ("auto", "triton", "torch")
TERM_CHOICES = {
    "normalize": ("none", "layernorm", "spatial"),
    "schedule": ("constant", "linear", "cosine"),
    "time_weighting": ("none", "data", "noise"),
    "projector": PROJECTORS,
}
POSITIVE = (
    "data.image_size",
    "optimizer.learning_rate",
    "optimizer.eps",
    "train.steps",
    "train.global_batch",
    "train.log_every",
    "train.checkpoint_every",
    "health.grace_seconds",
    "sample.steps",
    "sample.count",
    "sample.batch",
    "evaluate.count",
)
NOT_NEGATIVE = (
    "seed",
    "model.num_classes",
    "data.workers",
    "optimizer.weight_decay",
    "optimizer.warmup_steps",
    "optimizer.clip",
    "train.sample_every",
    "evaluate.every",
    "evaluate.reference_count",
    "health.max_skips",
    "health.max_rollbacks",
    "health.spike_deviations",
    "health.hang_seconds",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "sample.guidance",
)
TERM_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def validate(config: Config, world_size: int) -> None:
    """Raises `ConfigError` for the first rule that `config` breaks on `world_size` ranks.

    The data set itself is compared with the configuration later (data/batches.py), and DeepSpeed's file where it is
    filled in (deepspeed_config.py).
    """
    for key, known in CHOICES.items():
        _one_of(key, _value(config, key), known)
    _one_of("alignment.kernel", config.alignment_kernel, KERNELS)
    for key in POSITIVE:
        _at_least(key, _value(config, key), 0, exclusive=True)
    if config.checkpoint.upload and "://" not in config.checkpoint.upload:
        raise ConfigError(
            f"checkpoint.upload={config.checkpoint.upload} is no URL; give one such as s3://bucket/runs/xl"
        )
    for key in NOT_NEGATIVE:
        _at_least(key, _value(config, key), 0)
    parse_windows(config.health.leave_out)
    _check_data(config)
    _check_model(config)
    batch_split(config, world_size)
    _check_optimizer(config)
    _check_sampling(config)
    _check_evaluation(config)
    _check_tracking(config)
    if config.method == "repa":
        for name, term in config.alignment.items():
            _check_term(config, name, term)
        if not config.alignment:
            raise ConfigError("method=repa has no alignment term; give alignment.repa.encoder=..., or method=baseline")
    if config.deepspeed.config and not Path(config.deepspeed.config).is_file():
        raise ConfigError(
            f"deepspeed.config={config.deepspeed.config} is not a file; name one, or leave it out for the packaged one"
        )


def batch_split(config: Config, world_size: int) -> tuple[int, int]:
    """Samples a rank and forward pass, and forward passes a step, that make up `train.global_batch`.

    Raises:
        ConfigError: the global batch does not divide.
    """
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch < 1 or batch % world_size:
        better = max(1, round(batch / world_size)) * world_size
        raise ConfigError(
            f"train.global_batch={batch} does not divide by {world_size} ranks; use train.global_batch={better}"
        )
    share = batch // world_size
    if micro is None:
        return share, 1
    if micro < 1 or share % micro:
        fits = max(divisor for divisor in range(1, share + 1) if share % divisor == 0 and divisor <= max(1, micro))
        raise ConfigError(
            f"train.micro_batch={micro} does not divide the {share} samples a rank of train.global_batch={batch} "
            f"on {world_size} ranks; use train.micro_batch={fits}"
        )
    return micro, share // micro


def _check_data(config: Config) -> None:
    if config.data.remote and config.data.path:
        raise ConfigError(
            f"data.remote={config.data.remote} and data.path={config.data.path} name two sets; give one "
            "(data.path= takes a preset's away)"
        )
    if not config.data.path and not config.data.remote:
        raise ConfigError("data.path is empty; give data.path=FOLDER, made by: repa-scale prepare SOURCE --out FOLDER")
    share(config.data.max_bad)
    size_in_bytes(config.data.cache_limit)
    if config.data.cache_limit and not config.data.remote:
        raise ConfigError(
            f"data.cache_limit={config.data.cache_limit} limits the cache of data.remote, which is not set"
        )
    spec = latent_spec(config.latents.name)
    if spec.kind == "identity" and config.latents.weights not in ("hub", "random"):
        raise ConfigError(
            f"latents.weights={config.latents.weights}: latents.name=identity has no weights; leave it out"
        )
    _check_weights("latents.weights", config.latents.weights, ("hub", "random"))


def _check_model(config: Config) -> None:
    backbone(config.model.name)
    token_grid(config.data.image_size, config.latents.name, config.model.name)
    _within("model.class_dropout", config.model.class_dropout, 0.0, 1.0)
    if config.train.init_from and not Path(config.train.init_from).exists():
        raise ConfigError(
            f"train.init_from={config.train.init_from} does not exist; name a folder or a safetensors file of weights"
        )


def _check_term(config: Config, name: str, term: TermConfig) -> None:
    key = f"alignment.{name}"
    if name == "kernel":
        raise ConfigError("alignment.kernel is a key, so no term can have its name; rename the term")
    if not TERM_NAME.fullmatch(name):
        raise ConfigError(f"{key}: a term's name has letters, digits and _ and starts with a letter; rename it")
    for field, known in TERM_CHOICES.items():
        _one_of(f"{key}.{field}", getattr(term, field), known)
    if term.encoder not in ENCODERS:
        raise ConfigError(f"{key}.encoder={term.encoder} is not an encoder{did_you_mean(term.encoder, ENCODERS)}")
    _check_weights(f"{key}.weights", term.weights, ("hub", "package", "random"))
    size, _ = backbone(config.model.name)
    if not 1 <= term.depth <= size.depth:
        raise ConfigError(
            f"{key}.depth={term.depth} must be 1 to {size.depth}, the blocks of model.name={config.model.name}; "
            f"use {max(1, size.depth // 3)}"
        )
    _at_least(f"{key}.projector_dim", term.projector_dim, 0, exclusive=True)
    _at_least(f"{key}.weight", term.weight, 0)
    if not math.isfinite(term.gamma):
        raise ConfigError(f"{key}.gamma={term.gamma} must be a finite number; use 0.6")
    if term.stop_step is not None:
        _at_least(f"{key}.stop_step", term.stop_step, 0, exclusive=True)
    _check_schedule(key, term.schedule, term.schedule_steps, config.train.steps)
    _check_encoder_grid(config, key, term)


def _check_encoder_grid(config: Config, key: str, term: TermConfig) -> None:
    """The encoder's input follows from the token grid, so that it gives one token for each patch of the latent."""
    rows, columns = token_grid(config.data.image_size, config.latents.name, config.model.name)
    if term.normalize == "spatial" and rows * columns < 2:
        raise ConfigError(
            f"{key}.normalize=spatial needs at least 2 tokens, but model.name={config.model.name} has {rows * columns} "
            f"at data.image_size={config.data.image_size}; use a smaller patch or {key}.normalize=none"
        )


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if len(optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas={optimizer.betas} must have two numbers; use [0.9,0.999]")
    for beta in optimizer.betas:
        if not 0.0 <= beta < 1.0:
            raise ConfigError(f"optimizer.betas={optimizer.betas} must lie in [0, 1); use [0.9,0.999]")
    _check_schedule("optimizer", optimizer.schedule, optimizer.schedule_steps, config.train.steps)
    if optimizer.schedule != "constant" and optimizer.schedule_steps <= optimizer.warmup_steps:
        raise ConfigError(
            f"optimizer.schedule_steps={optimizer.schedule_steps} must be above "
            f"optimizer.warmup_steps={optimizer.warmup_steps}; use optimizer.schedule_steps={config.train.steps}"
        )
    if not 0.0 < config.ema.decay < 1.0:
        raise ConfigError(f"ema.decay={config.ema.decay} must lie between 0 and 1; use 0.9999, or 0.99 for a short run")


def _check_schedule(key: str, schedule: str, steps: int | None, run_steps: int) -> None:
    if schedule != "constant" and steps is None:
        raise ConfigError(f"{key}.schedule={schedule} needs {key}.schedule_steps; for example {run_steps}")
    if steps is not None:
        _at_least(f"{key}.schedule_steps", steps, 0, exclusive=True)


def _check_sampling(config: Config) -> None:
    interval = config.sample.interval
    if len(interval) != 2 or not 0.0 <= interval[0] < interval[1] <= 1.0:
        raise ConfigError(f"sample.interval={interval} must be two rising numbers in [0, 1]; use [0.0,1.0]")


def _check_evaluation(config: Config) -> None:
    evaluate = config.evaluate
    if not evaluate.every:
        return
    for key in ("count", "reference_count"):
        if getattr(evaluate, key) == 1:
            raise ConfigError(f"evaluate.{key}=1 has no covariance; use 1000 or more")
    names = [text.partition("=")[0] for text in evaluate.extractors]
    if not names:
        raise ConfigError("evaluate.extractors=[] names none; use [effnet-lite0], or evaluate.every=0")
    for name in names:
        _one_of("evaluate.extractors", name, ("inception", *ENCODERS))
        if names.count(name) > 1:
            raise ConfigError(f"evaluate.extractors={evaluate.extractors} names {name} twice; name each once")
    if not evaluate.reference:
        return
    if len(names) > 1:
        raise ConfigError(
            f"evaluate.reference={evaluate.reference} holds the statistics of one extractor, but evaluate.extractors "
            f"names {len(names)}; name one, or leave the reference out"
        )
    if not Path(evaluate.reference).is_file():
        raise ConfigError(
            f"evaluate.reference={evaluate.reference} is not a file; give an .npz with mu and sigma, or leave it out "
            "for the run's own data"
        )


def _check_tracking(config: Config) -> None:
    uri = config.tracking.uri
    if not uri:
        raise ConfigError("tracking.uri is empty; give an MLflow URI such as sqlite:///mlflow.db, or none")
    if re.match(r"[a-z0-9+]+://[^/@]*:[^/@]+@", uri):
        raise ConfigError(
            "tracking.uri holds a password, and the configuration is written to the run folder; remove it from the URI "
            "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )


def _check_weights(key: str, weights: str, kinds: Iterable[str]) -> None:
    """One of `kinds`, or a path that exists."""
    if weights not in kinds and not Path(weights).exists():
        path_like = "/" in weights or "." in weights
        hint = "; the path does not exist" if path_like else did_you_mean(weights, kinds)
        raise ConfigError(f"{key}={weights} must be {', '.join(kinds)} or a local path{hint}")


def _value(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _one_of(key: str, value: object, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"{key}={value} must be one of {', '.join(known)}{_closest(value, known)}")


def _closest(value: object, known: Iterable[str]) -> str:
    hint = did_you_mean(str(value), known)
    return hint if hint.startswith("; did") else ""


def _at_least(key: str, value: float, least: float, exclusive: bool = False) -> None:
    if not math.isfinite(value) or value < least or (exclusive and value == least):
        rule = f"above {least}" if exclusive else f"{least} or more"
        raise ConfigError(f"{key}={value} must be a number {rule}; give another value")


def _within(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{key}={value} must lie in [{low}, {high}]; give another value")
