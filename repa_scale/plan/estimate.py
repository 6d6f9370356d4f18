"""A run's sizes, and the formulas of memory and times put together for them. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from repa_scale.config import Config
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.flops import (
    VIT_DEPTH,
    backbone_flops,
    encoder_flops,
    projector_flops,
)
from repa_scale.plan import memory, storage, times
from repa_scale.plan.cluster import Cluster
from repa_scale.plan.memory import Memory
from repa_scale.plan.times import Step
from repa_scale.sizes import backbone, encoder_spec, latent_grid, latent_spec, token_grid
from repa_scale.validation import batch_split

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}

USABLE = 0.95  # of a GPU's memory: the allocator cannot fill the rest


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a run. `terms`: (encoder, projector_dim, projector) of each."""

    parameters: int
    tokens: int
    width: int
    depth: int
    pixels: int
    latents: str  # kind of the latent space
    moments: int  # values of an image's posterior
    terms: tuple[tuple[str, int, str], ...]
    model: str
    precision: str
    compiled: bool
    checkpointed: bool
    source: str
    workers: int
    stage: int
    micro_batch: int
    passes: int
    gradients: int  # bytes of an accumulated gradient
    communication: int  # bytes of a gradient on the wire
    bucket: int
    kept: bool  # gathered weights stay between the passes
    fused: bool  # Triton's projector

    @property
    def live(self) -> bool:
        """Whether a network looks at the images."""
        return self.source == "image" or (self.source == "moments" and bool(self.terms))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Those that run in each step."""
        return () if self.source == "moments+tokens" else tuple(dict.fromkeys(name for name, _, _ in self.terms))


def shape_of(config: Config, cluster: Cluster, parameters: int) -> Shape:
    """Of a valid configuration. Raises `ConfigError` where it and its DeepSpeed file contradict each other."""
    settings = deepspeed_dict(config, cluster.ranks, parameters, "cuda")
    zero = settings["zero_optimization"]
    micro, passes = batch_split(config, cluster.ranks)
    rows, columns = token_grid(config.data.image_size, config.latents.name, config.model.name)
    channels, height, width = latent_grid(config.data.image_size, config.latents.name)
    size, _ = backbone(config.model.name)
    compute = config.train.precision
    terms = {} if config.method == "baseline" else config.alignment
    return Shape(
        parameters=parameters,
        tokens=rows * columns,
        width=size.width,
        depth=size.depth,
        pixels=config.data.image_size**2,
        latents=latent_spec(config.latents.name).kind,
        moments=(2 if latent_spec(config.latents.name).kind == "kl" else 1) * channels * height * width,
        terms=tuple((term.encoder, term.projector_dim, term.projector) for term in terms.values()),
        model=config.model.name,
        precision=config.train.precision,
        compiled=config.train.compile,
        checkpointed=config.train.activation_checkpointing,
        source=config.data.source,
        workers=config.data.workers,
        stage=zero["stage"],
        micro_batch=micro,
        passes=passes,
        gradients=BYTES[settings.get("data_types", {}).get("grad_accum_dtype") or compute],
        communication=BYTES[settings.get("communication_data_type") or compute],
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        kept=zero.get("stage3_max_live_parameters", 1e9) >= parameters,
        fused=config.alignment_kernel != "torch",
    )


def memory_of(shape: Shape, ranks: int) -> Memory:
    """Bytes on each rank."""
    b, t = shape.micro_batch, shape.tokens
    activations = memory.activation_bytes(
        b, t, shape.width, shape.depth, shape.precision, shape.compiled, shape.checkpointed
    )
    for encoder, hidden, kind in shape.terms:
        inner = hidden if kind == "mlp" else 0
        activations += memory.projector_bytes(b, t, inner, encoder_spec(encoder).width, shape.precision, shape.fused)
    weights, work = (0.0, 0.0)
    if shape.source == "image":
        weights, work = memory.vae_bytes(shape.latents, b, shape.pixels)
    for name in shape.encoders:
        spec = encoder_spec(name)
        if spec.kind == "vit":
            held, peak = memory.vit_bytes(spec.width, VIT_DEPTH[spec.width], b, t + spec.prefix_tokens, shape.precision)
            weights, work = weights + held, max(work, peak)
    return Memory(
        state=memory.state_bytes(shape.parameters, ranks, shape.stage, shape.precision, shape.gradients),
        gathered=memory.gathered_bytes(shape.parameters, shape.stage, shape.precision, shape.kept, shape.depth),
        buckets=memory.bucket_bytes(shape.parameters, shape.bucket, shape.communication),
        activations=activations,
        optimizer=memory.step_bytes(shape.parameters, ranks),
        frozen_weights=weights,
        frozen_work=work,
    )


def step_of(shape: Shape, cluster: Cluster) -> Step:
    """Seconds of an optimiser step."""
    gpu, images = cluster.row, shape.micro_batch * shape.passes
    forward = backbone_flops(shape.model, shape.tokens)
    trained = (4 if shape.checkpointed else 3) * forward
    for encoder, hidden, kind in shape.terms:
        trained += 3 * projected_flops(shape, hidden, kind, encoder_spec(encoder).width)
    frozen = sum(encoder_flops(name, shape.tokens) for name in shape.encoders)
    frozen_seconds = times.matrix_seconds(images * frozen, gpu, shape.precision)
    if shape.source == "image":
        flops = images * times.vae_flops(shape.latents, shape.pixels)
        frozen_seconds += times.matrix_seconds(flops, gpu, "fp32" if shape.precision == "fp32" else "tf32")
    gathers, reductions = times.traffic_bytes(
        shape.parameters, shape.stage, shape.passes, BYTES[shape.precision], shape.communication, shape.kept
    )
    decoded = images / storage.loader_rate(shape.live, cluster.format, shape.pixels, shape.workers)
    return Step(
        matrix=times.matrix_seconds(images * trained, gpu, shape.precision),
        elementwise=times.elementwise_seconds(
            images, shape.tokens, shape.width, shape.depth, gpu, shape.precision, shape.compiled, shape.checkpointed
        ),
        frozen=frozen_seconds,
        communication=times.communication_seconds(gathers + reductions, cluster),
        host=times.host_seconds(shape.depth, shape.stage, shape.passes, cluster.host),
        data=decoded,
        optimizer=times.optimizer_seconds(shape.parameters, cluster.ranks, gpu),
    )


def projected_flops(shape: Shape, hidden: int, kind: str, target: int) -> float:
    if kind == "mlp":
        return projector_flops(shape.width, target, shape.tokens, hidden)
    return 2 * shape.tokens * shape.width * target * (9 if kind == "conv" else 1)


def flops_of(shape: Shape) -> float:
    """Floating-point operations of training on one image, frozen networks included."""
    total = (4 if shape.checkpointed else 3) * backbone_flops(shape.model, shape.tokens)
    total += sum(encoder_flops(name, shape.tokens) for name in shape.encoders)
    for encoder, hidden, kind in shape.terms:
        total += 3 * projected_flops(shape, hidden, kind, encoder_spec(encoder).width)
    return total + (times.vae_flops(shape.latents, shape.pixels) if shape.source == "image" else 0.0)


def fits(held: Memory, cluster: Cluster) -> bool:
    """Whether the peak leaves the allocator some room."""
    return held.peak <= USABLE * cluster.row.memory
