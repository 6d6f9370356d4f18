"""One of two ranks under ZeRO-3: a projector with the alignment loss, in plain torch and in Triton's interpreter.

Writes for both kernels this rank's shards of the gradients, the bytes alive between forward and backward, and the peak.

    RANK=0 WORLD_SIZE=2 ... TRITON_INTERPRET=1 python zero3_worker.py OUT.pt
"""

import gc
import sys

import torch
from torch import nn

from repa_scale.engine import _import_deepspeed
from repa_scale.models.projectors import build_projector
from repa_scale.ranks import Ranks

D, INNER, Z = 512, 1024, 768
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,  # what is gathered is freed at once
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "reduce_bucket_size": 1_000_000,
        "memory_efficient_linear": False,
    },
    "zero_allow_untested_optimizer": True,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(D, D)
        self.projector = build_projector("mlp", D, INNER, Z, (2, 2))

    def forward(self, x, target, kernel):
        return self.projector(self.trunk(x), target, kernel).mean()


def memory(key):
    """Bytes resident now (VmRSS), or at most since the last reset (VmHWM). Large tensors have pages of their own."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{key}:"))


def run(deepspeed, kernel, rank):
    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=SETTINGS):
        net = Net()
    deepspeed.utils.set_z3_leaf_module(net.projector, True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.0, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=SETTINGS, dist_init_required=False)
    for name, parameter in net.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
            torch.manual_seed(len(name))
            nn.init.normal_(parameter, std=0.03)
    generator = torch.Generator().manual_seed(10 + rank)
    x, target = (torch.randn(2, 4, size, generator=generator) for size in (D, Z))
    for _ in range(2):  # the first loads and warms what it needs
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = memory("VmRSS")
        loss = engine(x, target, kernel)
        gc.collect()
        alive = memory("VmRSS") - before
        engine.backward(loss)
        peak = memory("VmHWM") - before
        gradients = [deepspeed.utils.safe_get_local_grad(p).clone() for p in net.parameters()]
        engine.step()
    shards = sum(p.ds_tensor.numel() for p in net.parameters()) / sum(p.ds_numel for p in net.parameters())
    engine.destroy()
    return {"loss": loss.item(), "gradients": gradients, "alive": alive, "peak": peak, "share": shards}


def main() -> None:
    ranks = Ranks.from_environment("cpu")
    torch.distributed.init_process_group("gloo")  # Ranks.start would keep freed memory, and all would seem alive
    deepspeed = _import_deepspeed(ranks)
    results = {kernel: run(deepspeed, kernel, ranks.rank) for kernel in ("torch", "triton")}
    results["weights"] = 4 * (D * INNER + INNER * INNER + INNER * Z)
    torch.save(results, sys.argv[1])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
