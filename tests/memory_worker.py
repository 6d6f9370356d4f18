"""One of several real processes that train a few steps and report what memory they held. For test_plan.py.

python tests/memory_worker.py FILE stage=N key=value ...     RANK, WORLD_SIZE and so on in the environment
"""

import gc
import json
import sys
from pathlib import Path

import torch

from benchmarks.zero_memory import give_freed_memory_back, peak, watermark
from repa_scale.compose import compose
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.ema import ShardEma
from repa_scale.engine import Engine, import_deepspeed
from repa_scale.objective import build_objective, count_parameters, total
from repa_scale.ranks import Ranks
from repa_scale.sizes import encoder_spec, latent_grid
from repa_scale.validation import batch_split


def main(file: str, stage: int, words: list[str]) -> None:
    config = compose(words)
    ranks = Ranks.from_environment("cpu")
    ranks.start()
    give_freed_memory_back()
    import_deepspeed("cpu")
    settings = deepspeed_dict(config, ranks.world_size, count_parameters(config), "cpu")
    settings["zero_optimization"]["stage"] = stage
    small = compose([*words, "model.name=SiT-Nano/8", "alignment.repa.depth=1", "alignment.repa.projector_dim=8"])
    with torch.random.fork_rng():
        step(run(small, settings, ranks, 1)[0], small, 1)  # libraries and threads are there before anything is counted
    gc.collect()
    before = watermark(ranks.device)
    micro, passes = batch_split(config, ranks.world_size)
    engine, ema = run(config, settings, ranks, micro)
    gc.collect()
    watermark(ranks.device)
    for _ in range(2):
        for _ in range(passes):
            step(engine, config, micro)
        ema.update()
    most = peak(ranks.device) - before
    gc.collect()
    held = watermark(ranks.device) - before
    Path(file).write_text(json.dumps({"peak": most, "held": held}))
    ranks.barrier()
    ranks.leave()


def run(config, settings, ranks, micro):
    settings = {**settings, "train_micro_batch_size_per_gpu": micro}
    if micro * settings["gradient_accumulation_steps"] * ranks.world_size != settings["train_batch_size"]:
        settings["train_batch_size"] = micro * settings["gradient_accumulation_steps"] * ranks.world_size
    adam = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    checkpointing = config.train.activation_checkpointing
    engine = Engine(lambda: build_objective(config), settings, ranks, checkpointing=checkpointing, **adam)
    engine.write(lambda name, shape, start, stop: torch.randn(stop - start).mul_(0.02))
    return engine, ShardEma([shard.master for shard in engine.shards], 0.9999)


def step(engine, config, micro):
    channels, height, width = latent_grid(config.data.image_size, config.latents.name)
    x = torch.randn(micro, channels, height, width)
    z = encoder_spec(config.alignment["repa"].encoder).width
    targets = {"repa": torch.randn(micro, engine.module.model.grid**2, z)}
    labels = torch.zeros(micro, dtype=torch.int64)
    losses = engine(x, torch.rand(micro), labels, x, targets)
    engine.backward(total(losses, {"repa": 0.5}))
    if engine.ds.is_gradient_accumulation_boundary():
        engine.step(1e-4)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2].removeprefix("stage=")), sys.argv[3:])
