"""The plan of a run as plain values in bytes, seconds and counts, which the table and `--json` show."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from repa_scale.config import Config
from repa_scale.flops import backbone_flops
from repa_scale.plan import storage
from repa_scale.plan.advice import advise
from repa_scale.plan.cluster import Cluster
from repa_scale.plan.estimate import Shape, fits, flops_of, memory_of, shape_of, step_of
from repa_scale.plan.memory import Memory
from repa_scale.plan.times import Step
from repa_scale.sizes import encoder_spec


def plan_of(config: Config, cluster: Cluster, parameters: int) -> dict[str, Any]:
    """The plan of a run on a cluster.

    Args:
        parameters: trained ones, projectors included.
    """
    shape = shape_of(config, cluster, parameters)
    held, step = memory_of(shape, cluster.ranks), step_of(shape, cluster)
    return {
        "cluster": {
            **dataclasses.asdict(cluster),
            "ranks": cluster.ranks,
            "network": cluster.node_network * 8e-9 / cluster.gpus,
        },
        "model": {
            "name": shape.model,
            "parameters": parameters,
            "tokens": shape.tokens,
            "encoders": list(shape.encoders),
            "latents": config.latents.name,
            "flops_an_image": flops_of(shape),
        },
        "settings": _settings(shape, config.train.global_batch),
        "memory": _memory_values(held, cluster),
        "step": _step_values(step, shape, config, cluster),
        "run": _run_values(step, config, cluster, parameters),
        "checkpoint": _checkpoint_values(step, config, cluster, parameters),
        "data": _data_values(step, shape, config, cluster),
        "advice": advise(shape, config, cluster),
    }


def _settings(shape: Shape, batch: int) -> dict[str, Any]:
    return {
        "zero_stage": shape.stage,
        "global_batch": batch,
        "micro_batch": shape.micro_batch,
        "accumulation": shape.passes,
        "precision": shape.precision,
        "compile": shape.compiled,
        "activation_checkpointing": shape.checkpointed,
        "source": shape.source,
    }


def _memory_values(held: Memory, cluster: Cluster) -> dict[str, Any]:
    return {
        "state_bytes": held.state,
        "gathered_bytes": held.gathered,
        "bucket_bytes": held.buckets,
        "activation_bytes": held.activations,
        "optimizer_bytes": held.optimizer,
        "frozen_weight_bytes": held.frozen_weights,
        "frozen_work_bytes": held.frozen_work,
        "runtime_bytes": held.runtime,
        "peak_bytes": held.peak,
        "gpu_bytes": cluster.row.memory,
        "fits": fits(held, cluster),
    }


def _step_values(step: Step, shape: Shape, config: Config, cluster: Cluster) -> dict[str, Any]:
    rate = config.train.global_batch / step.seconds
    trained = 3 * backbone_flops(shape.model, shape.tokens)
    peak = cluster.row.fp32 if shape.precision == "fp32" else cluster.row.fp16
    return {
        **{f"{name}_seconds": value for name, value in dataclasses.asdict(step).items()},
        "seconds": step.seconds,
        "bound_by": step.bound_by,
        "images_per_second": rate,
        "images_per_second_a_gpu": rate / cluster.ranks,
        "share_of_peak": rate / cluster.ranks * trained / peak,
    }


def _run_values(step: Step, config: Config, cluster: Cluster, parameters: int) -> dict[str, Any]:
    saves = math.ceil(config.train.steps / config.train.checkpoint_every)
    total = storage.checkpoint_bytes(parameters)
    wait = storage.copy_seconds(total, cluster.ranks)
    if not config.checkpoint.asynchronous:
        wait += storage.disk_seconds(total, cluster.nodes, cluster.disk)
    seconds = config.train.steps * step.seconds + saves * wait
    hours = seconds / 3600 * cluster.ranks
    return {
        "steps": config.train.steps,
        "epochs": config.train.steps * config.train.global_batch / cluster.images,
        "seconds": seconds,
        "days": seconds / 86400,
        "gpu_hours": hours,
        "cost": hours * cluster.price if cluster.price else None,
    }


def _checkpoint_values(step: Step, config: Config, cluster: Cluster, parameters: int) -> dict[str, Any]:
    total = storage.checkpoint_bytes(parameters)
    saves = math.ceil(config.train.steps / config.train.checkpoint_every)
    kept = saves if not config.checkpoint.keep_last else min(saves, config.checkpoint.keep_last + 1)
    if config.checkpoint.keep_last and config.checkpoint.keep_every:
        kept += config.train.steps // config.checkpoint.keep_every
    copy, disk = storage.copy_seconds(total, cluster.ranks), storage.disk_seconds(total, cluster.nodes, cluster.disk)
    return {
        "bytes": total,
        "bytes_a_rank": total / cluster.ranks,
        "host_bytes_a_node": total / cluster.nodes if config.checkpoint.asynchronous else 0.0,
        "saves": saves,
        "kept_bytes": min(kept, saves) * total,
        "every_seconds": config.train.checkpoint_every * step.seconds,
        "waits_seconds": copy if config.checkpoint.asynchronous else copy + disk,
        "write_seconds": disk,
        "read_seconds": disk,
    }


def _data_values(step: Step, shape: Shape, config: Config, cluster: Cluster) -> dict[str, Any]:
    tokens = sum(2 * shape.tokens * encoder_spec(name).width for name in dict.fromkeys(t[0] for t in shape.terms))
    image = storage.image_bytes(cluster.format, shape.pixels)
    sample = storage.sample_bytes(shape.source, image, 4.0 * shape.moments, float(tokens))
    node_rate = config.train.global_batch / step.seconds / cluster.nodes
    one = storage.loader_rate(shape.live, cluster.format, shape.pixels, 1)
    return {
        "bytes_an_image": sample,
        "set_bytes": sample * cluster.images,
        "images_per_second_a_node": node_rate,
        "bytes_per_second_a_node": node_rate * sample,
        "cores_a_node": node_rate / one,
        "workers_a_node": max(1, config.data.workers) * cluster.gpus,
    }
