"""What `engine.Engine` asks of DeepSpeed, on one rank of the `meta` device: the real module and AdamW, no sharding.

It does to parameters and buffers what DeepSpeed does (test_real_engine.py holds the two side by side): `zero.Init`
builds parameters on the device and leaves buffers alone; `initialize` makes the parameters 16-bit and gives the
optimizer flat fp32 master weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from meta_device import META
from torch import Tensor, nn

# What `zero.Init` sends to the device; what another function makes in a constructor stays on the host.
CONSTRUCTORS = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def stand_in() -> SimpleNamespace:
    """In place of the module `deepspeed`."""

    @contextmanager
    def init(config_dict_or_path: dict, enabled: bool):
        with pytest.MonkeyPatch.context() as patch:
            for name in CONSTRUCTORS if enabled else ():
                patch.setattr(torch, name, functools.partial(_on_the_device, getattr(torch, name)))
            yield

    return SimpleNamespace(zero=SimpleNamespace(Init=init), initialize=initialize)


def _on_the_device(make: Callable[..., Tensor], *args, **kwargs) -> Tensor:
    return make(*args, **{**kwargs, "device": kwargs.get("device") or META})


def initialize(model: nn.Module, optimizer: torch.optim.AdamW, config: dict, dist_init_required: bool):
    dtype = next((dtype for name, dtype in DTYPES.items() if config[name]["enabled"]), torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    wrapped = (Stage3 if config["zero_optimization"]["stage"] == 3 else Stages12)(optimizer, dtype)
    return MetaEngine(model, wrapped, config), wrapped, None, None


class Sharded:
    """The optimizer's side: for each group one flat fp32 tensor, which AdamW updates."""

    def __init__(self, inner: torch.optim.AdamW, dtype: torch.dtype) -> None:
        self.inner = inner
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in inner.param_groups]
        self.flats = [torch.empty(sum(p.numel() for p in group), device=META) for group in self.groups]
        for group, flat in zip(inner.param_groups, self.flats, strict=True):
            group["params"] = [flat]
        self.param_groups = inner.param_groups
        self.loss_scaler = SimpleNamespace(cur_scale=2.0**16 if dtype == torch.float16 else 1.0, cur_iter=0)
        self.places = {}
        for number, group in enumerate(self.groups):
            offset = 0
            for parameter in group:
                self.places[id(parameter)] = (number, offset, parameter.numel())
                offset += parameter.numel()

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.cur_scale

    def step(self, clip: float) -> Tensor:
        """Gathers the gradients, clips, updates, copies back. Returns their norm, on the device."""
        for group, flat in zip(self.groups, self.flats, strict=True):
            flat.grad = torch.cat([_gradient(p) for p in group]) / self.loss_scale
        norm = torch.stack([flat.grad.norm() for flat in self.flats]).norm()
        for flat in self.flats:
            flat.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        self.inner.step()
        self.update_lp_params()
        for group in self.groups:
            for parameter in group:
                parameter.grad = None
        return norm

    @torch.no_grad()
    def update_lp_params(self) -> None:
        for group, flat in zip(self.groups, self.flats, strict=True):
            for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
                parameter.data.view(-1).copy_(part)


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Zeros of a module that was not run, such as the projector of a term that is off."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.reshape(-1).float()


class Stage3(Sharded):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.fp32_partitioned_groups_flat = self.flats
        self.grad_position = self.places
        self.persistent_parameters: list = []
        for group in self.groups:
            for p in group:
                p.ds_shape, p.ds_numel, p.ds_persist = p.shape, p.numel(), False
                p.ds_tensor = SimpleNamespace(data=p.data.view(-1))

    def get_param_id(self, parameter: nn.Parameter) -> int:
        return id(parameter)


class Stages12(Sharded):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.single_partition_of_fp32_groups = self.flats
        for group in self.groups:
            for p in group:
                number, offset, numel = self.places[id(p)]
                p._hp_mapping = SimpleNamespace(
                    param_group_index=number,
                    hp_fragment_address=SimpleNamespace(start=offset, numel=numel),
                    lp_fragment_address=SimpleNamespace(start=0, numel=numel),
                )


class MetaEngine:
    def __init__(self, module: nn.Module, optimizer: Sharded, config: dict) -> None:
        self.module, self.optimizer, self.config = module, optimizer, config
        self.global_steps = self.skipped_steps = self.micro_steps = 0
        self._norm: Tensor | None = None

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.config["gradient_accumulation_steps"] == 0

    def backward(self, loss: Tensor) -> None:
        (loss * (self.optimizer.loss_scale / self.config["gradient_accumulation_steps"])).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self._norm = self.optimizer.step(self.config["gradient_clipping"])
            self.global_steps += 1
        self.micro_steps += 1

    def was_step_applied(self) -> bool:
        return self._norm is not None

    def get_global_grad_norm(self) -> Tensor:
        return self._norm

    def empty_partition_cache(self) -> None:
        assert self.config["zero_optimization"]["stage"] == 3

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()
