"""The configuration of a run: one dataclass a room, no torch, no Hydra.

Hydra's structured configs are these classes; the YAML files in `configs/` only set values. `docs/configuration.md`
explains every key.
"""

from __future__ import annotations

import copy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Dict, List, Optional, get_args, get_origin, get_type_hints


def added(default: Any, *, before: Any) -> Any:
    """A key that stored runs may lack: its default for new runs, and what runs did `before` the key existed.

    Every key added after the first release is declared this way (CONTRIBUTING.md), so that no older run is orphaned:
    wherever a stored configuration or identity lacks the key, `before` holds (`from_dict`, identity.py). A run's
    identity names the key only where its value differs from `before`.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"before": before})
    return field(default=default, metadata={"before": before})


def value_before(key: Field) -> Any:
    """What runs did before this key existed; `MISSING` for a key that was always there."""
    return copy.copy(key.metadata["before"]) if "before" in key.metadata else MISSING


@dataclass
class RunConfig:
    """The run folder and how a start treats what is already there."""

    name: str = ""  # a label for people and for MLflow; the preset's name by default
    dir: str = ""  # default: runs/NAME-METHOD-seedN
    resume: str = "auto"  # auto: go on from the newest good checkpoint; never: refuse a folder that has one


@dataclass
class ModelConfig:
    """The SiT backbone."""

    name: str = "SiT-XL/2"  # a row of sizes.BACKBONES and a patch size
    num_classes: int = 1000  # 0: unlabelled data
    class_dropout: float = 0.1  # probability that a label becomes the null label in training
    qk_norm: Optional[bool] = None  # default: what the row says


@dataclass
class DataConfig:
    """The prepared data set (see `repa-scale prepare`)."""

    path: str = ""
    source: str = "image"  # image | moments | moments+tokens: what is read as the set stores it, not made in each step
    image_size: int = 256  # pixels; must equal the prepared size
    workers: int = 2  # loader processes a rank; 0: decode in the training process
    verify: bool = True  # check the hash of every shard before its first use
    decoder: str = "auto"  # auto | dali | pillow
    flip: bool = added(False, before=False)  # mirror each picture with probability one half
    max_bad: str = "0.1%"  # share of the samples that may be unreadable; above it the run stops
    remote: str = ""  # URL of the set (s3://..., gs://...), instead of data.path
    cache: str = ""  # folder on a local disk for the shards of a remote set
    cache_limit: str = ""  # bytes that the cached shards may take, such as 200gb; empty: all of them


@dataclass
class LatentsConfig:
    """What the transformer sees: a VAE's latents, or the pixels themselves."""

    name: str = "sd-vae-ft-mse"  # a row of sizes.LATENTS
    weights: str = "hub"  # hub | random | a local folder


@dataclass
class InterpolantConfig:
    """The path from data (t = 0) to noise (t = 1), and how t is drawn."""

    path: str = "linear"  # linear | cosine
    time: str = "uniform"  # uniform | lognormal


@dataclass
class TermConfig:
    """One alignment term; `alignment.NAME` holds as many as wanted. The paper's is named `repa`."""

    encoder: str = "dinov2-vit-b"  # a row of sizes.ENCODERS
    weights: str = "hub"  # hub | package | random | a local file
    depth: int = 8  # hidden tokens are taken after this block, counted from 1
    weight: float = 0.5
    projector: str = "mlp"  # mlp | linear | conv
    projector_dim: int = 2048
    normalize: str = "none"  # none | layernorm | spatial: what is done to the target tokens
    gamma: float = 0.6  # of spatial normalisation
    schedule: str = "constant"  # constant | linear | cosine: decay of the weight to 0 at schedule_steps
    schedule_steps: Optional[int] = None
    stop_step: Optional[int] = None  # from this step on the term is off and its encoder is not run
    time_weighting: str = "none"  # none | data: weight (1 - t), more on clean images | noise: weight t


@dataclass
class OptimizerConfig:
    """AdamW, its learning rate over steps, and clipping."""

    learning_rate: float = 1e-4
    betas: List[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | linear | cosine: decay to 0 at schedule_steps
    schedule_steps: Optional[int] = None
    clip: float = 1.0  # gradient norm; 0: no clipping


@dataclass
class EmaConfig:
    """The exponential moving average of the weights, in fp32."""

    decay: float = 0.9999


@dataclass
class TrainConfig:
    """Length, batch, precision, and what happens how often."""

    steps: int = 400_000
    global_batch: int = 256
    micro_batch: Optional[int] = None  # samples a rank and forward pass; default: global_batch / ranks
    precision: str = "bf16"  # fp32 | bf16 | fp16
    device: str = "auto"  # auto | cuda | cpu
    activation_checkpointing: bool = False
    compile: bool = False  # torch.compile, block by block
    deterministic: bool = False  # deterministic kernels, at some speed
    init_from: str = ""  # a folder or safetensors file of initial weights under public names
    log_every: int = 50
    checkpoint_every: int = 10_000
    sample_every: int = 0  # 0: off


@dataclass
class CheckpointConfig:
    """How checkpoints are written, and which stay."""

    asynchronous: bool = True  # training waits for the copy to host memory alone; false: until the files are written
    keep_last: int = 0  # the newest N stay, the others are deleted; 0: all stay
    keep_every: int = 0  # those at multiples of N steps stay as well; 0: none
    best: str = ""  # the one with the least `loss`, say, stays as well; empty: none
    upload: str = (
        ""  # a URL such as s3://bucket/run, where the newest is copied to; a start without a checkpoint uses it
    )


@dataclass
class HealthConfig:
    """What a run does about gradients that are not finite, spikes, hangs and the wish to stop."""

    max_skips: int = 3  # steps in a row that are not applied; one more rolls back and leaves their batches out
    max_rollbacks: int = 3  # one more ends the run with code 65
    on_spike: str = "log"  # log | skip (costs a reduction a step) | rollback
    spike_deviations: float = 10.0  # robust deviations above the median of the last steps; 0: off
    leave_out: str = added("", before="")  # batches never to train on, such as "12-15,40"
    hang_seconds: float = 300.0  # the least deadline of a phase; 0: no watchdog
    grace_seconds: float = 600.0  # from the wish to stop to the end of the save


@dataclass
class SampleConfig:
    """How the sample grids are drawn."""

    sampler: str = "euler"  # euler | heun | sde
    steps: int = 50
    guidance: float = 1.0  # 1: no guidance
    interval: List[float] = field(default_factory=lambda: [0.0, 1.0])
    count: int = 64
    batch: int = 64


@dataclass
class EvaluateConfig:
    """A small Fréchet distance of the EMA model during training; its samples are drawn as `sample` says."""

    every: int = 0  # steps; 0: off
    count: int = 1000  # samples
    # Rows of the table of extractors, each NAME or NAME=WEIGHTS.
    extractors: List[str] = field(default_factory=lambda: ["effnet-lite0"])
    reference_count: int = 10_000  # real images of the run's own set; 0: all
    reference: str = ""  # an .npz with mu and sigma, instead of them


@dataclass
class TrackingConfig:
    """MLflow."""

    uri: str = "sqlite:///mlflow.db"  # `none`: off
    experiment: str = "repa_scale"
    tensorboard: bool = False  # the same numbers and pictures to RUN/tensorboard as well


@dataclass
class DeepSpeedConfig:
    """The DeepSpeed JSON (ds_config.json)."""

    config: str = ""  # default: the one that this package brings


@dataclass
class Config:
    """Everything that a run can be told."""

    method: str = "repa"  # repa | baseline (no alignment terms)
    seed: int = 0
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    interpolant: InterpolantConfig = field(default_factory=InterpolantConfig)
    alignment: Dict[str, TermConfig] = field(default_factory=lambda: {"repa": TermConfig()})
    alignment_kernel: str = "auto"  # auto | triton | torch; spelled `alignment.kernel` (compose.py)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)


def from_dict(values: dict[str, Any], of: type = Config) -> Any:
    """A configuration as it was stored: by `dataclasses.asdict`, in a checkpoint, an export or MLflow.

    A key that is left out has the value from before it existed (`added`), else its default.

    Raises:
        KeyError: a key that the dataclass does not have.
    """
    hints = get_type_hints(of)
    if unknown := set(values) - {f.name for f in fields(of)}:
        raise KeyError(f"{of.__name__} has no key {sorted(unknown)[0]}")
    known = {name: _convert(value, hints[name]) for name, value in values.items()}
    for key in fields(of):
        if key.name not in known:
            if is_dataclass(hints[key.name]):
                known[key.name] = from_dict({}, hints[key.name])
            elif (before := value_before(key)) is not MISSING:
                known[key.name] = before
    return of(**known)


def _convert(value: Any, hint: Any) -> Any:
    if is_dataclass(hint):
        return from_dict(value, hint)
    if get_origin(hint) is dict:
        return {key: _convert(item, get_args(hint)[1]) for key, item in value.items()}
    return value
