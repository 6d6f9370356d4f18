"""DeepSpeed around the trained module, and each rank's shard of its state. The only room that knows DeepSpeed."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repa_scale import devices
from repa_scale.errors import ConfigError, require
from repa_scale.objective import Objective
from repa_scale.ranks import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Shard:
    """This rank's part of one parameter: the elements [start, stop) of the flattened parameter.

    Attributes:
        master: (stop - start,) fp32 master weights; a view of what the optimiser updates.
        moments: `exp_avg` and `exp_avg_sq` of AdamW, like `master`.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What an optimiser step did. A step that was not applied changed nothing but the loss scale."""

    applied: bool
    grad_norm: float
    loss_scale: float


# Gives the elements [start, stop) of a flattened parameter: initial values, public weights, a checkpoint.
Source = Callable[[str, tuple[int, ...], int, int], Tensor]


class Engine:
    """A DeepSpeed engine of stage 1, 2 or 3 whose state is read and written in shards.

    Args:
        build: makes the trained module. Under stage 3 it runs inside `zero.Init`: each sub-module is cut up as soon
            as it is built, so no rank ever holds the whole model. Initial values come afterwards, through `write`.
        ds_config: the filled-in DeepSpeed configuration (deepspeed_config.py).
        compile: compile each block as one graph.
        checkpointing: recompute each block's activations in the backward pass.
    """

    def __init__(
        self,
        build: Callable[[], Objective],
        ds_config: dict,
        ranks: Ranks,
        *,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        compile: bool = False,
        checkpointing: bool = False,
    ) -> None:
        deepspeed = _import_deepspeed(ranks)
        self.stage = ds_config["zero_optimization"]["stage"]
        self.ranks = ranks
        with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=self.stage == 3):
            objective = build()
        _prepare_blocks(objective, compile, checkpointing)
        place(objective, ranks.device, self.stage)
        # Two groups, so that the gradient norm of the backbone is summed in the same order with and without projectors.
        groups = [{"params": list(objective.model.parameters())}, {"params": list(objective.projectors.parameters())}]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=learning_rate,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=devices.on_gpu(ranks.device),
        )
        self.ds, self.optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=ds_config, dist_init_required=False
        )
        self.module: Objective = self.ds.module
        self.names = {name: parameter for name, parameter in self.module.named_parameters()}
        self._adam_states = [_adam_state(optimizer, flat) for flat in self._flats()]
        self.shards = [shard for shard in map(self._shard, self.names.items()) if shard is not None]
        self._first_scalars = self.scalars()

    # The step.

    def __call__(self, *args: Tensor, **kwargs: object) -> dict[str, Tensor]:
        return self.ds(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """The backward pass of one micro batch."""
        self.ds.backward(loss)
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()  # only counts the micro batch

    def step(self, learning_rate: float) -> Outcome:
        """The optimiser step, after the last micro batch's backward pass."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.ds.step()
        applied = bool(self.ds.was_step_applied())
        # After a skipped step DeepSpeed still holds the norm of an earlier one.
        norm = float(self.ds.get_global_grad_norm()) if applied else float("inf")
        return Outcome(applied, norm, self.loss_scale)

    @property
    def loss_scale(self) -> float:
        """The fp16 loss scale; 1 in the other precisions."""
        return float(getattr(self.optimizer, "loss_scale", 1.0) or 1.0)

    # The state.

    @torch.no_grad()
    def write(self, source: Source) -> None:
        """Sets the master weights from `source`, then the weights that the forward pass uses from them."""
        self._free_gathered()
        for shard in self.shards:
            shard.master.copy_(source(shard.name, shard.shape, shard.start, shard.stop))
        self.refresh()

    @torch.no_grad()
    def restart(self) -> None:
        """Forgets what the optimiser has learned: moments, counters, loss scale."""
        for shard in self.shards:
            for moment in shard.moments.values():
                moment.zero_()
        self.set_scalars(self._first_scalars)

    @torch.no_grad()
    def refresh(self, values: list[Tensor] | None = None) -> None:
        """Copies the master weights, or `values` in their place, into the weights of the forward pass, on all ranks."""
        masters = [shard.master for shard in self.shards]
        if self.stage < 3:
            kept = [master.clone() for master in masters] if values is not None else []
            for master, value in zip(masters, values or (), strict=values is not None):
                master.copy_(value)
            self.optimizer.update_lp_params()
            for master, value in zip(masters, kept, strict=values is not None):
                master.copy_(value)
            return
        for shard, value in zip(self.shards, masters if values is None else values, strict=True):
            _stage3_local(self.names[shard.name])[: shard.stop - shard.start].copy_(value)
        persistent = getattr(self.optimizer, "persistent_parameters", None)
        if persistent:
            persistent[0].all_gather(persistent)

    @contextmanager
    def weights_replaced(self, values: list[Tensor]) -> Iterator[None]:
        """Inside, the forward pass uses `values` (one for each shard), such as an EMA. The masters stay as they are."""
        self._free_gathered()
        self.refresh(values)
        self.ds.eval()
        try:
            yield
        finally:
            self._free_gathered()
            self.refresh()
            self.ds.train()

    def _free_gathered(self) -> None:
        """Under stage 3 gathered weights may stay alive between passes; drop them before the shards change."""
        if self.stage == 3:
            self.ds.empty_partition_cache()

    @property
    def optimizer_steps(self) -> int:
        """How many optimiser steps were applied, as AdamW counts them."""
        return int(self._adam_states[0]["step"]) if self._adam_states else 0

    def scalars(self) -> dict:
        """The state that is not in shards: AdamW's step, the loss scaler, DeepSpeed's counters. JSON."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
        return {
            "optimizer_steps": self.optimizer_steps,
            "global_steps": self.ds.global_steps,
            "skipped_steps": self.ds.skipped_steps,
            "loss_scaler": {k: getattr(scaler, k) for k in keys if hasattr(scaler, k)},
        }

    def set_scalars(self, scalars: dict) -> None:
        for state in self._adam_states:
            state["step"].fill_(scalars["optimizer_steps"])
        self.ds.global_steps = scalars["global_steps"]
        self.ds.skipped_steps = scalars["skipped_steps"]
        scaler = getattr(self.optimizer, "loss_scaler", None)
        for key, value in scalars["loss_scaler"].items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    @property
    def parameters(self) -> int:
        """Trained parameters, over all ranks."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self.names.values())

    def partitioned_share(self) -> float:
        """Share of the elements whose weights are really cut up over the ranks (stage 3; 0 below it)."""
        if self.stage < 3:
            return 0.0
        cut = sum(p.ds_numel for p in self.names.values() if not p.ds_persist)
        return cut / sum(p.ds_numel for p in self.names.values())

    def close(self) -> None:
        self.ds.destroy()

    def _flats(self) -> list[Tensor]:
        """The flat fp32 tensors that the optimiser updates on this rank."""
        for attribute in (
            "fp32_partitioned_groups_flat",
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
        ):
            if hasattr(self.optimizer, attribute):
                return list(getattr(self.optimizer, attribute))
        raise RuntimeError(f"unknown DeepSpeed optimiser {type(self.optimizer).__name__}")

    def _shard(self, item: tuple[str, nn.Parameter]) -> Shard | None:
        name, parameter = item
        if self.stage == 3:
            group, offset, length = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            shape, numel = tuple(parameter.ds_shape), parameter.ds_numel
            start = min(self.ranks.rank * length, numel)
            stop = min(start + length, numel)  # behind it lies padding
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # another rank's partition holds it
                return None
            group, offset = mapping.param_group_index, mapping.hp_fragment_address.start
            shape = tuple(parameter.shape)
            start = mapping.lp_fragment_address.start
            stop = start + mapping.lp_fragment_address.numel
        flat, state = self._flats()[group], self._adam_states[group]

        def view(tensor: Tensor) -> Tensor:
            return tensor.detach().narrow(0, offset, stop - start)

        return Shard(name, shape, start, stop, view(flat), {key: view(state[key]) for key in MOMENTS})


def _import_deepspeed(ranks: Ranks):
    """Imports DeepSpeed, quietly, and without the shared-memory op that it would otherwise compile on a CPU."""
    deepspeed = import_deepspeed(ranks.device.type)
    if ranks.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed asks for AMX instructions; torch computes fp16 on any CPU, slowly but right.
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="nccl" if ranks.device.type == "cuda" else "gloo", verbose=False)
    assert dist.is_initialized()
    # DeepSpeed clones the world group, and passes no timeout on: NCCL's own of 10 minutes would be before the watchdog.
    deepspeed.comm.comm.cdb.new_group = functools.partial(dist.new_group, timeout=ranks.timeout)
    return deepspeed


def check_accelerator(device: str) -> None:
    """Refuses another accelerator for DeepSpeed than the ranks' own.

    Args:
        device: `cuda` or `cpu`, where the ranks work.

    Raises:
        ConfigError: DS_ACCELERATOR names another, or DeepSpeed is imported and has taken another.
    """
    wanted = os.environ.get("DS_ACCELERATOR", device)
    if wanted != device:
        other = f", or set train.device={wanted}" if wanted in ("cpu", "cuda") else ""
        raise ConfigError(f"DS_ACCELERATOR={wanted}, but the ranks work on {device}; unset DS_ACCELERATOR{other}")
    real = sys.modules.get("deepspeed.accelerator.real_accelerator")
    taken = getattr(real, "ds_accelerator", None)
    if taken is not None and taken.device_name() != device:
        raise ConfigError(
            f"train.device={device}, but DeepSpeed has taken {taken.device_name()} in this process already; start a "
            "process per device"
        )


def import_deepspeed(device: str):
    """DeepSpeed without what only its autotuner and its Muon use: MLflow, and torch's compiler as an import-time cost.

    Both would be loaded on every rank before its first step. MLflow is hidden meanwhile, so no other thread may import
    it at the same time: call this before the tracker's thread starts.

    Args:
        device: `cuda` or `cpu`, where the ranks work.

    Raises:
        ConfigError: of `check_accelerator`.
    """
    check_accelerator(device)
    return _imported(device)


@functools.cache
def _imported(device: str):
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\..*")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    hide = "deepspeed" not in sys.modules and "mlflow" not in sys.modules
    if hide:
        sys.modules["mlflow"] = None  # an import inside raises ImportError, which the autotuner is ready for
    told = "DS_ACCELERATOR" in os.environ
    os.environ["DS_ACCELERATOR"] = device  # else DeepSpeed takes CUDA wherever there is a GPU
    try:
        deepspeed = require("deepspeed", "train")
        deepspeed.accelerator.get_accelerator()  # and keeps it
    finally:
        if not told:
            os.environ.pop("DS_ACCELERATOR")
        if hide:
            sys.modules.pop("mlflow", None)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its import sets another
    from deepspeed.runtime import compiler

    decorate = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = decorate
    return deepspeed


def place(objective: Objective, device: torch.device, stage: int) -> None:
    """Moves to `device` what is not there yet. Under stage 3 that is the buffers: `zero.Init` moves parameters only,
    and DeepSpeed calls `Module.to` only where it has not partitioned them."""
    if stage < 3:
        objective.to(device)
        return
    for module in objective.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _prepare_blocks(objective: Objective, compile: bool, checkpointing: bool) -> None:
    """Makes blocks and projectors ZeRO-3 leaf modules, and compiles and checkpoints the blocks.

    A leaf module is gathered as a whole, so one block is one graph for the compiler and one gather for the network.
    Checkpointing has to stand inside the compiled function: around it, recomputation sees other tensors than the
    first pass and fails.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in (*objective.model.blocks, *objective.projectors.values()):
        set_z3_leaf_module(module, True)
    objective.model.checkpointing = checkpointing and not compile
    if compile:
        for block in objective.model.blocks:
            block.forward = torch.compile(
                _checkpointed(block.forward) if checkpointing else block.forward, fullgraph=True
            )


def _checkpointed(forward: Callable) -> Callable:
    def run(x: Tensor, c: Tensor) -> Tensor:
        return checkpoint(forward, x, c, use_reentrant=False)

    return run


def _adam_state(optimizer: torch.optim.AdamW, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of one flat tensor, made now instead of at the first step, so that it can be written before it."""
    step_device = flat.device if optimizer.defaults["fused"] else torch.device("cpu")
    state = optimizer.state[flat]
    state.update(
        step=torch.zeros((), dtype=torch.float32, device=step_device),
        exp_avg=torch.zeros_like(flat),
        exp_avg_sq=torch.zeros_like(flat),
    )
    return state


def _stage3_local(parameter: nn.Parameter) -> Tensor:
    return parameter.ds_tensor.data.view(-1)
