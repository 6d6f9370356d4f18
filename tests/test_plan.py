"""`repa-scale plan`: its bytes against real processes and counted tensors, its times against the counts behind them."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import free_port
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counted_memory import counted_peak
from repa_scale.cli import main
from repa_scale.compose import compose
from repa_scale.models import build_sit
from repa_scale.objective import count_parameters
from repa_scale.plan import memory, plan, storage, times
from repa_scale.plan.cluster import GPUS, parse_cluster
from repa_scale.plan.estimate import memory_of, shape_of
from repa_scale.sizes import BACKBONES, ENCODERS, backbone

ROOT = Path(__file__).resolve().parents[1]
# Beyond the tensors of a run: threads, gloo's buffers, what the allocator rounds up. Measured with a model of nothing.
PROCESS = 100e6


def words(**keys):
    return [f"{key}={value}" for key, value in keys.items()]


# Memory.


@pytest.mark.parametrize(
    ("name", "images", "precision", "checkpointed"),
    [
        ("SiT-B/2", 32, "bf16", False),
        ("SiT-S/2", 8, "fp32", False),
        ("SiT-XL/2", 4, "bf16", False),
        ("SiT-B/2", 32, "bf16", True),
    ],
)
def test_activations_are_those_that_a_step_keeps(name, images, precision, checkpointed):
    """Counted on tensors without contents: every storage that forward and backward of the real backbone make."""
    size, _ = backbone(name)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]

    def make():
        torch.set_default_dtype(dtype)
        try:
            model = build_sit(compose([f"model.name={name}"]))
        finally:
            torch.set_default_dtype(torch.float32)
        model.checkpointing = checkpointed
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        make.model = model
        inputs = [torch.empty(images, 4, 32, 32), torch.empty(images), torch.zeros(images, dtype=torch.long)]
        return [*inputs, *model.parameters(), *(p.grad for p in model.parameters()), *model.buffers()]

    def step(x, t, labels, *_):
        out, _ = make.model(x, t, labels)
        F.mse_loss(out.float(), x).backward()

    counted = counted_peak(make, step)
    planned = memory.activation_bytes(images, 256, size.width, size.depth, precision, False, checkpointed)
    assert planned == pytest.approx(counted, rel=0.1 if checkpointed else 0.03)


@pytest.mark.distributed
@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        (3, {"model.name": "SiT-B/8", "train.global_batch": 8}),
        (3, {"model.name": "SiT-B/8", "train.global_batch": 8, "train.precision": "fp32"}),
        (3, {"model.name": "SiT-Tiny/2", "train.global_batch": 32, "train.precision": "fp32"}),
        (2, {"model.name": "SiT-B/8", "train.global_batch": 2}),
        (1, {"model.name": "SiT-B/8", "train.global_batch": 4, "train.micro_batch": 1}),
    ],
)
def test_memory_is_that_of_two_real_processes(tmp_path, stage, keys):
    """Resident memory in and after real steps of DeepSpeed over gloo, which sums on a copy of what it is given."""
    given = words(**keys, **{"alignment.repa.depth": 4, "alignment.kernel": "torch"})
    port, workers = free_port(), []
    for rank in range(2):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1, "DS_ACCELERATOR": "cpu", "PYTHONPATH": ROOT}
        command = [sys.executable, ROOT / "tests" / "memory_worker.py", tmp_path / f"{rank}.json", f"stage={stage}"]
        workers.append(
            subprocess.Popen([*command, *given], env=os.environ | {k: str(v) for k, v in environment.items()})
        )
    try:
        assert [worker.wait(240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    config = compose(given)
    cluster, _ = parse_cluster(["nodes=1", "gpus=2"])
    shape = shape_of(config, cluster, count_parameters(config))
    shape = type(shape)(**{**vars(shape), "stage": stage})
    held = memory_of(shape, 2)
    state, bucket = sum(held.state.values()), held.buckets / 2
    after = state + bucket - (held.state["gradients"] if stage == 2 else 0)
    peak = state + max(held.passes, held.optimizer) + bucket  # gloo's copy
    for rank in range(2):
        real = json.loads((tmp_path / f"{rank}.json").read_text())
        print(
            f"stage {stage} {keys}: peak {real['peak'] / 1e6:.0f} MB, planned {(peak + PROCESS) / 1e6:.0f}; after the "
            f"step {real['held'] / 1e6:.0f} MB, planned {(after + PROCESS) / 1e6:.0f}"
        )
        assert peak + PROCESS == pytest.approx(real["peak"], rel=0.08)
        assert after + PROCESS == pytest.approx(real["held"], rel=0.05, abs=40e6)


def test_what_stays_is_the_bytes_of_zero():
    """16, 18, 20 or 22 bytes a parameter, of which each stage shards more."""
    whole = [sum(memory.state_bytes(1000, 1, stage, "bf16", 4).values()) for stage in (1, 2, 3)]
    assert whole == [22_000] * 3
    many = [sum(memory.state_bytes(1000, 10, stage, "bf16", 4).values()) for stage in (1, 2, 3)]
    assert many == [2000 + 4000 + 1600, 2000 + 400 + 1600, 200 + 400 + 1600]
    assert sum(memory.state_bytes(1000, 10, 3, "fp32", 4).values()) == 2400


@pytest.mark.long
def test_the_vae_is_counted():
    """Operations and peak of the real encoder on tensors without contents."""
    from repa_scale import torchvision_fix
    from repa_scale.latents import KL_SHAPE

    torchvision_fix.ensure()
    import diffusers

    with FakeTensorMode():
        vae, image = diffusers.AutoencoderKL(**KL_SHAPE), torch.empty(1, 3, 256, 256)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            vae.encode(image)
    assert times.vae_flops("kl", 256**2) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert sum(p.numel() for p in vae.parameters()) * 4 == memory.VAE_BYTES["kl"]


# Times.


@pytest.mark.parametrize(("model", "rate"), [("SiT-XL/2", 635), ("SiT-H/2", 360), ("SiT-3B/2", 174), ("SiT-7B/2", 77)])
def test_an_h100_trains_what_was_counted_by_hand(model, rate):
    """Compiled, 32 images a GPU, stored moments, DINOv2-B live, a host that is no limit."""
    keys = {"host": 0.1, "train.compile": "true", "data.source": "moments", "data.workers": 16}
    values = plan(words(**{"model.name": model}, **keys))
    assert values["step"]["bound_by"] == "matrix"
    assert values["step"]["images_per_second_a_gpu"] == pytest.approx(rate, rel=0.06)


@pytest.mark.parametrize(
    ("bound", "keys"),
    [
        ("host", {"nodes": 8}),
        ("frozen", {"latents.name": "sd-vae-ft-mse", "data.image_size": 512, "host": 0.1, "train.compile": "true",
                    "alignment.repa.encoder": "dinov2-vit-g"}),
        ("communication", {"nodes": 32, "network": 25, "host": 0.1}),
        ("data", {"format": "png", "data.workers": 1, "model.name": "SiT-S/2", "alignment.repa.depth": 4, "host": 0.1}),
        ("elementwise", {"data.source": "moments", "data.workers": 16, "model.name": "SiT-S/2", "host": 0.01,
                         "alignment.repa.depth": 4}),
    ],
)  # fmt: skip
def test_what_binds_a_step_is_named(bound, keys):
    values = plan(words(**keys))
    step = values["step"]
    assert step["bound_by"] == bound
    assert step[f"{bound}_seconds"] == max(
        step[f"{name}_seconds"] for name in ("matrix", "elementwise", "frozen", "communication", "host", "data")
    ) or bound in ("frozen", "elementwise")
    assert step["seconds"] >= max(step[f"{name}_seconds"] for name in ("communication", "host", "data"))


def test_days_hours_cost_and_checkpoints_are_one_sum():
    values = plan(["experiment=repa_sit_xl", "nodes=8", "gpus=8", "price=2.5", "disk=4", "train.steps=1000",
                   "train.checkpoint_every=300", "checkpoint.keep_last=2"])  # fmt: skip
    run, save, step = values["run"], values["checkpoint"], values["step"]
    parameters = values["model"]["parameters"]
    assert save["bytes"] == 16 * parameters and save["saves"] == 4 and save["kept_bytes"] == 3 * save["bytes"]
    assert save["write_seconds"] == pytest.approx(16 * parameters / 8 / 4e9)
    assert run["seconds"] == pytest.approx(1000 * step["seconds"] + 4 * save["waits_seconds"])
    assert run["days"] == pytest.approx(run["seconds"] / 86400)
    assert run["cost"] == pytest.approx(run["gpu_hours"] * 2.5) == pytest.approx(run["days"] * 24 * 64 * 2.5)
    assert run["epochs"] == pytest.approx(256_000 / 1_281_167)
    late = plan(["experiment=repa_sit_xl", "nodes=8", "disk=4", "checkpoint.asynchronous=false"])["checkpoint"]
    assert late["waits_seconds"] > save["write_seconds"]


def test_stored_features_are_read_and_not_made():
    live, stored = (plan([f"data.source={source}"]) for source in ("image", "moments+tokens"))
    assert stored["step"]["frozen_seconds"] == 0 == stored["memory"]["frozen_weight_bytes"]
    assert stored["data"]["bytes_an_image"] - live["data"]["bytes_an_image"] == 8 * 32 * 32 * 4 + 256 * 768 * 2


# Advice.


@pytest.mark.parametrize(
    "keys",
    [
        {"model.name": "SiT-7B/2", "gpu": "A100"},
        {"model.name": "SiT-7B/2", "gpu": "H100", "gpus": 4, "train.global_batch": 1024},
        {"model.name": "SiT-XL/2", "gpu": "B200", "nodes": 4},
    ],
)
def test_the_advised_settings_fit_and_are_what_a_plan_of_them_says(keys, tmp_path):
    advice = plan(words(**keys))["advice"]
    assert advice["fits"]
    file = tmp_path / "ds.json"
    settings = json.loads((ROOT / "ds_config.json").read_text())
    settings["zero_optimization"]["stage"] = advice["zero_stage"]
    file.write_text(json.dumps(settings))
    taken = plan(words(**keys, **{
        "train.micro_batch": advice["micro_batch"],
        "train.activation_checkpointing": str(advice["activation_checkpointing"]).lower(),
        "deepspeed.config": file,
    }))  # fmt: skip
    assert taken["memory"]["fits"] and taken["memory"]["peak_bytes"] == advice["peak_bytes"]
    assert taken["step"]["seconds"] == advice["step_seconds"]


def test_what_cannot_fit_is_said(capsys):
    assert main(["plan", "model.name=SiT-7B/2", "gpus=1"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "nothing fits" in out


# The verb.


@pytest.mark.long
def test_every_backbone_encoder_and_gpu_has_a_plan():
    for model in BACKBONES:
        plan([f"model.name={model}/2", "alignment.repa.depth=1", "train.global_batch=64"])
    for encoder in ENCODERS:
        values = plan(["gpus=64", f"alignment.repa.encoder={encoder}", "model.name=SiT-S/2", "alignment.repa.depth=4"])
        assert values["step"]["seconds"] > 0
    for gpu in GPUS:
        assert plan(["model.name=SiT-S/2", f"gpu={gpu}"])["memory"]["gpu_bytes"] == GPUS[gpu].memory


def test_json_holds_the_plan(capsys):
    assert main(["plan", "experiment=repa_sit_xl", "nodes=8", "gpus=8", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"cluster", "model", "settings", "memory", "step", "run", "checkpoint", "data", "advice"}
    assert values["cluster"]["ranks"] == 64 and values["run"]["cost"] is None
    assert main(["plan", "experiment=repa_sit_xl", "nodes=8", "gpus=8"]) == 0
    assert f"{values['run']['days']:.2f} days" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("gpu=H1000", "gpu=H1000 is not known; did you mean 'H100'?"),
        ("nodes=x", "nodes=x is not a whole number"),
        ("nodes=0", "nodes=0 must be above 0"),
        ("gpus=3", "train.global_batch=256 does not divide by 3 ranks; use train.global_batch=255"),
        ("node=3", "unknown key node"),
        ("train.precision=bf61", "train.precision=bf61 must be one of fp32, bf16, fp16"),
        ("format=webp", "format=webp must be jpeg or png"),
    ],
)
def test_a_mistake_is_one_line(word, line, capsys):
    assert main(["plan", word]) == 64
    assert line in capsys.readouterr().err


def test_each_formula_has_its_source_and_stands_in_the_docs():
    page = (ROOT / "docs" / "plan.md").read_text()
    for module in (memory, times, storage):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                assert "Source:" in function.__doc__, name
                assert f"`{name}`" in page, name
