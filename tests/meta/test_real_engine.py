"""What the step on `meta` takes for granted of DeepSpeed: what the real engine does to parameters and buffers."""

from __future__ import annotations

import json

import meta_deepspeed
import pytest
import torch
from meta_device import META
from process_group import group_of_one

from repa_scale import engine
from repa_scale.compose import compose
from repa_scale.deepspeed_config import deepspeed_dict
from repa_scale.engine import Engine
from repa_scale.models import position_table_of
from repa_scale.objective import build_objective
from repa_scale.ranks import Ranks

WORDS = ["experiment=demo_baseline", "model.name=SiT-Nano/2", "train.global_batch=8", "data.path=x"]


@pytest.fixture(scope="module")
def ranks():
    with group_of_one() as ranks:
        yield ranks


def built(config, ranks, stage):
    settings = deepspeed_dict(config, 1, 10**6, "cpu")
    settings["zero_optimization"]["stage"] = stage
    made = Engine(lambda: build_objective(config), json.loads(json.dumps(settings)), ranks,
                  learning_rate=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)  # fmt: skip
    tensors = {"parameters": made.module.named_parameters(), "buffers": made.module.named_buffers()}
    return made, {kind: {name: value.dtype for name, value in each} for kind, each in tensors.items()}


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")])
def test_the_stand_in_does_to_tensors_what_deepspeed_does(stage, precision, ranks, monkeypatch):
    config = compose([*WORDS, f"train.precision={precision}"])
    placed = []
    place = engine.place
    monkeypatch.setattr(engine, "place", lambda *words: (placed.append(words[1:]), place(*words)))
    real, theirs = built(config, ranks, stage)
    assert placed == [(ranks.device, stage)]
    assert {value.device for value in (*real.module.parameters(), *real.module.buffers())} == {ranks.device}
    table = position_table_of(config)
    assert torch.equal(real.module.model.pos_embed.float(), table.to(real.module.model.pos_embed.dtype).float())
    shards = {(s.name, s.shape, s.start, s.stop, s.master.dtype) for s in real.shards}
    real.close()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_import_deepspeed", lambda ranks: meta_deepspeed.stand_in())
        patch.setattr(engine.devices, "on_gpu", lambda device: False)
        patch.setattr(Engine, "optimizer_steps", 0)
        fake, ours = built(config, Ranks(0, 0, 1, META), stage)
    assert ours == theirs
    assert {(s.name, s.shape, s.start, s.stop, s.master.dtype) for s in fake.shards} == shards
