"""deepspeed_config.py: what is filled in, and what contradicts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from process_group import group_of_one

from repa_scale.compose import compose
from repa_scale.deepspeed_config import OURS, REMOVED, deepspeed_dict, packaged_file, zero_stage
from repa_scale.engine import Engine, import_deepspeed
from repa_scale.errors import ConfigError
from repa_scale.objective import build_objective

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def write(tmp_path):
    """Writes a changed copy of the packaged file and returns the override that names it."""

    def write(text: str | None = None, **changes) -> str:
        values = json.loads(packaged_file().read_text())
        for path, value in changes.items():
            node, *rest = (values, *path.split("__"))
            for part in rest[:-1]:
                node = node.setdefault(part, {})
            node[rest[-1]] = value
        file = tmp_path / "mine.json"
        file.write_text(json.dumps(values) if text is None else text)
        return f"deepspeed.config={file}"

    return write


def fill(*argv: str, world: int = 2, parameters: int = 10**9, device: str = "cuda") -> dict:
    return deepspeed_dict(compose(["experiment=repa_sit_xl", *argv]), world, parameters, device)


def test_everything_is_filled_in():
    values = fill("train.micro_batch=32", "optimizer.clip=0.5")
    assert "auto" not in json.dumps(values)
    assert values["train_batch_size"] == 256 == 2 * 32 * values["gradient_accumulation_steps"]
    assert values["train_micro_batch_size_per_gpu"] == 32 and values["gradient_clipping"] == 0.5
    zero = values["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_param_persistence_threshold"] == 0
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == 2 * 10**9
    assert zero["reduce_bucket_size"] == zero["stage3_prefetch_bucket_size"] == 50_000_000
    assert zero["overlap_comm"] is True and zero["memory_efficient_linear"] is False
    assert values["data_types"]["grad_accum_dtype"] == values["communication_data_type"] == "fp32"
    assert values["timers"] == {"throughput": {"enabled": False}}


def test_buckets_are_no_larger_than_the_model():
    assert fill(parameters=1000, device="cpu")["zero_optimization"]["reduce_bucket_size"] == 1000
    assert fill(device="cpu")["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize(("precision", "on"), [("fp32", None), ("bf16", "bf16"), ("fp16", "fp16")])
def test_precision_comes_from_the_run(precision, on):
    values = fill(f"train.precision={precision}")
    assert [name for name in ("bf16", "fp16") if values[name]["enabled"]] == ([on] if on else [])


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({"train_batch_size": 128}, "train.global_batch=256"),
        ({"train_micro_batch_size_per_gpu": 4}, "train.micro_batch"),
        ({"gradient_accumulation_steps": 4}, "train.micro_batch"),
        ({"gradient_clipping": 2.0}, "optimizer.clip=1.0"),
        ({"fp16__enabled": True}, "train.precision=bf16"),
        ({"bf16__enabled": False}, "train.precision=bf16"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.*"),
        ({"scheduler": {"type": "WarmupLR"}}, "optimizer.schedule"),
    ],
)
def test_a_contradiction_names_both_places(write, changes, ours):
    override = write(**changes)
    with pytest.raises(ConfigError) as caught:
        fill(override)
    message = str(caught.value)
    theirs = ".".join(next(iter(changes)).split("__"))
    assert "mine.json" in message and theirs in message and ours in message and "\n" not in message, message


def test_agreement_and_own_values_pass(write):
    override = write(train_batch_size=256, bf16__enabled=True, zero_optimization__reduce_bucket_size=7)
    assert fill(override)["zero_optimization"]["reduce_bucket_size"] == 7
    values = fill(write('{"zero_optimization": {"stage": 2}}'))
    assert values["train_batch_size"] == 256 and values["timers"] == {"throughput": {"enabled": False}}
    assert fill(write(timers={"throughput": {"enabled": True}}))["timers"]["throughput"]["enabled"] is True
    assert fill(write(bf16__check_grad_overflow=False))["bf16"] == {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize(
    ("text", "changes", "part"),
    [
        ("{", {}, "not JSON"),
        ("[]", {}, "keys and sections"),
        (None, {"zero_optimization__stage": 0}, "must be 1, 2 or 3"),
        (None, {"zero_optimization__stage": "auto"}, "must be 1, 2 or 3"),
        (None, {"zero_optimization__offload_optimizer": {"device": "cpu"}}, "offload_optimizer"),
        (None, {"steps_per_print": "auto"}, "steps_per_print"),
        ('{"gradient_cliping": 1, "zero_optimization": {"stage": 3}}', {}, "'gradient_clipping'"),
        ('{"bf16": true, "zero_optimization": {"stage": 3}}', {}, "bf16=true must be a section"),
        ('{"timers": false, "zero_optimization": {"stage": 3}}', {}, "timers=false must be a section"),
        (None, {"zero_optimization__mics_shard_size": 8}, "zero_optimization.mics_shard_size is not supported"),
        (
            None,
            {"zero_optimization__mics_hierarchical_params_gather": None},
            "removed it (MiCS; stage 3 shards over all",
        ),
        (None, {"elasticity": {"enabled": True}}, "a run resumes on any number of ranks"),
    ],
)
def test_a_bad_file_is_answered_in_one_line(write, text, changes, part):
    override = write(text, **changes)
    with pytest.raises(ConfigError) as caught:
        fill(override)
    assert part in str(caught.value) and "mine.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"deepspeed.config=/absent.json cannot be read"):
        zero_stage(compose(["deepspeed.config=/absent.json"]))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_the_files(write, stage):
    assert zero_stage(compose([write(zero_optimization__stage=stage)])) == stage


def test_the_packaged_file_is_the_one_at_the_root():
    assert json.loads(packaged_file().read_text()) == json.loads((ROOT / "ds_config.json").read_text())


def test_the_wheel_brings_the_file(tmp_path):
    script = (
        "import sys; from setuptools import setup; sys.argv = ['setup.py', '-q', 'build_py', '-d', sys.argv[1]];"
        "exec(open('setup.py').read())"
    )
    run = [sys.executable, "-c", script, str(tmp_path / "lib")]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True, timeout=120)
    built = tmp_path / "lib" / "repa_scale" / "configs"
    assert (built / "ds_config.json").read_bytes() == (ROOT / "ds_config.json").read_bytes()
    assert (built / "experiment" / "demo_repa.yaml").is_file()


def test_every_key_that_deepspeed_removed_is_refused_here():
    """The names are DeepSpeed's own, and private: if they move, look where they went."""
    import_deepspeed("cpu")
    from deepspeed.runtime import config as theirs

    removed = {f"zero_optimization.{key}" for key in theirs._REMOVED_ZERO_CONFIG_KEYS}
    removed |= set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert removed - {"amp"} == set(REMOVED) and "amp" in OURS


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Four steps of a real engine in this process; the loss of the fourth is infinite.

    steps(settings) returns whether the fourth was applied, whether all master weights are finite after it, and the
    files of the code that waited for the device in the last two steps.
    """
    from deepspeed.accelerator import get_accelerator

    words = ["model.name=SiT-Nano/8", "data.image_size=8", "latents.name=identity", "model.num_classes=0"]
    words += ["method=baseline", "train.global_batch=4", "train.precision=bf16"]
    adam = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    waits = []

    def steps(settings: dict) -> tuple[bool, bool, list[str]]:
        file = tmp_path_factory.mktemp("ds") / "ds.json"
        file.write_text(json.dumps(settings))
        config = compose([*words, f"deepspeed.config={file}"])
        engine = Engine(lambda: build_objective(config), deepspeed_dict(config, 1, 50_000, "cpu"), ranks, **adam)
        generator = torch.Generator().manual_seed(0)
        engine.write(lambda _name, _shape, start, stop: 0.1 * torch.randn(stop - start, generator=generator))
        for number in range(1, 5):
            if number == 3:  # the timer does not count the first two
                waits.clear()
            x = torch.randn(4, 3, 8, 8, generator=generator)
            losses = engine(x, torch.rand(4, generator=generator), torch.zeros(4, dtype=torch.int64), x, {})
            engine.backward(losses["denoising"].mean() * (float("inf") if number == 4 else 1.0))
            applied = engine.step(1e-3).applied
        finite = all(bool(shard.master.isfinite().all()) for shard in engine.shards)
        engine.close()
        return applied, finite, list(waits)

    with group_of_one() as ranks, pytest.MonkeyPatch.context() as patch:
        caller = sys._getframe
        patch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(caller(1).f_code.co_filename))
        yield steps


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.long), 2, 3])
def test_what_deepspeed_does_in_a_step(steps, stage):
    """Its throughput timer waits for the device twice, unless it is off. A bf16 step that is not finite is skipped:
    under stages 1 and 2 thanks to `check_grad_overflow` alone, so it stays on; stage 3 looks at the norm. (Stage 1
    with fp32 gradient accumulation, which this file leaves out, has DeepSpeed's BF16_Optimizer: the norm there too.)
    """
    zero = {"zero_optimization": {"stage": stage}}
    applied, finite, waits = steps(zero)
    assert (applied, finite) == (False, True) and not [file for file in waits if file.endswith("utils/timer.py")]
    changed = {"bf16": {"check_grad_overflow": False}, "timers": {"throughput": {"enabled": True}}}
    applied, finite, waits = steps({**zero, **changed})
    assert (applied, finite) == ((False, True) if stage == 3 else (True, False))
    assert len([file for file in waits if file.endswith("utils/timer.py")]) == 4


def test_bf16_accumulation_costs_what_the_documentation_says():
    """Eight micro batches: some 0.3 % of the gradient (docs/configuration.md); this is why the default is fp32."""
    from repa_scale.models import build_sit

    generator = torch.Generator().manual_seed(0)
    model = build_sit(compose(["model.name=SiT-Nano/1", "data.image_size=8", "latents.name=identity"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model = model.to(torch.bfloat16)
    parameters = list(model.parameters())
    exact = [torch.zeros(p.shape) for p in parameters]
    rough = [torch.zeros(p.shape, dtype=torch.bfloat16) for p in parameters]
    for _ in range(8):
        x, target = torch.randn(2, 4, 3, 8, 8, generator=generator)
        velocity, _ = model(x.bfloat16(), torch.rand(4, generator=generator), torch.arange(4))
        gradients = torch.autograd.grad((velocity.float() - target).square().mean(), parameters)
        for a, b, gradient in zip(exact, rough, gradients, strict=True):
            a += gradient.float()
            b += gradient
    difference = sum((a - b.float()).square().sum() for a, b in zip(exact, rough, strict=True))
    error = float((difference / sum(a.square().sum() for a in exact)).sqrt())
    assert 0.001 < error < 0.008
