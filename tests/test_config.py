"""compose.py: presets, overrides, frozen files, and one line for every mistake."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from repa_scale.compose import compose, known_keys, presets, print_requested, resolved_yaml
from repa_scale.config import Config, TermConfig
from repa_scale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAIRS = [("repa_sit_xl", "baseline_sit_xl"), ("repa_sit_l", "baseline_sit_l"), ("repa_sit_b", "baseline_sit_b")]
PAIRS += [("demo_repa", "demo_baseline"), ("cifar10_repa", "cifar10_baseline")]


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("preset", presets())
def test_a_frozen_preset_composes_to_an_equal_config(preset, tmp_path):
    config = compose([f"experiment={preset}", "alignment.second.weight=0.25", "train.micro_batch=4"])
    assert type(config) is Config and type(config.alignment["second"]) is TermConfig
    file = tmp_path / "config.yaml"
    file.write_text("# identity_hash: 0123\n" + resolved_yaml(config))
    assert compose(["--config", str(file)]) == config
    assert compose(["--config", str(file), "seed=7"]).seed == 7


def test_every_promised_preset_is_there():
    assert set(presets()) == {name for pair in PAIRS for name in pair} | {"repa_sit_xl_512"}


@pytest.mark.parametrize(("repa", "baseline"), PAIRS)
def test_a_baseline_differs_from_its_preset_in_the_method_only(repa, baseline):
    one, other = compose([f"experiment={repa}"]), compose([f"experiment={baseline}"])
    assert (one.method, other.method) == ("repa", "baseline")
    other.method, other.run = one.method, one.run
    assert one == other


def test_the_papers_settings():
    for preset, model, depth, size in (
        ("repa_sit_xl", "SiT-XL/2", 8, 256),
        ("repa_sit_l", "SiT-L/2", 8, 256),
        ("repa_sit_b", "SiT-B/2", 4, 256),
        ("repa_sit_xl_512", "SiT-XL/2", 8, 512),
    ):
        config = compose([f"experiment={preset}"])
        term = config.alignment["repa"]
        assert (config.model.name, term.depth, config.data.image_size) == (model, depth, size)
        assert (term.encoder, term.weight, term.projector, term.projector_dim) == ("dinov2-vit-b", 0.5, "mlp", 2048)
        optimizer = config.optimizer
        assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, [0.9, 0.999], 0.0)
        assert (optimizer.schedule, optimizer.clip, config.ema.decay) == ("constant", 1.0, 0.9999)
        assert (config.train.steps, config.train.global_batch, config.train.precision) == (400_000, 256, "bf16")
        assert (config.latents.name, config.model.class_dropout) == ("sd-vae-ft-mse", 0.1)


def test_the_config_is_completed():
    config = compose(["experiment=demo_baseline", "seed=3"])
    assert (config.run.name, config.run.dir) == ("demo_baseline", "runs/demo_baseline-baseline-seed3")
    assert config.model.qk_norm is False and compose(["model.name=SiT-7B/2"]).model.qk_norm is True
    assert compose([]).run.dir == "runs/sit-xl-2-repa-seed0"


def test_the_last_of_a_key_wins_and_launchers_arguments_are_dropped():
    argv = ["--local_rank=1", "--local_rank", "2", "--deepspeed", "--deepspeed_config", "my.json"]
    config = compose([*argv, "train.steps=3", "experiment=demo_repa", "train.steps=4", "optimizer.betas=[0.9,0.95]"])
    assert (config.train.steps, config.deepspeed.config, config.optimizer.betas) == (4, "my.json", [0.9, 0.95])


def test_values_keep_their_type():
    config = compose(["optimizer.learning_rate=1e-3", "run.name=007", "data.path=a b=c", "run.dir='x: y'", "seed=12"])
    assert (config.optimizer.learning_rate, config.run.name, config.seed) == (1e-3, "007", 12)
    assert (config.data.path, config.run.dir) == ("a b=c", "x: y")
    assert compose(["train.micro_batch=8", "train.micro_batch=null"]).train.micro_batch is None


def test_terms_can_be_added_and_removed(tmp_path):
    config = compose(["alignment.deep.depth=12", "~alignment.repa"])
    assert list(config.alignment) == ["deep"] and config.alignment["deep"] == TermConfig(depth=12)
    file = tmp_path / "one.yaml"
    file.write_text(resolved_yaml(config))
    assert compose(["--config", str(file)]) == config
    assert compose(["alignment.deep={depth: 2, weight: 1}"]).alignment["deep"] == TermConfig(depth=2, weight=1.0)
    assert "no such term" in refusal("~alignment.other")
    assert "only an alignment term" in refusal("~train.steps")


def test_the_kernel_is_a_key_among_the_terms(tmp_path):
    config = compose(["experiment=demo_repa", "alignment.kernel=torch"])
    assert config.alignment_kernel == "torch" and list(config.alignment) == ["repa"]
    assert compose(["experiment=demo_repa"]).alignment_kernel == "auto"
    file = tmp_path / "config.yaml"
    file.write_text(resolved_yaml(config))
    assert "alignment:\n  kernel: torch\n  repa:\n" in file.read_text() and "alignment_kernel" not in file.read_text()
    assert compose(["--config", str(file)]) == config
    assert compose(["alignment={kernel: triton, repa: {depth: 2}}"]).alignment_kernel == "triton"
    for words in ("alignment.kernel.depth=1", "alignment.kernel={depth: 1}"):
        assert "not a term" in refusal(words)
    assert "no such term" in refusal("~alignment.kernel")


def test_a_preset_may_set_the_kernel(monkeypatch):
    values = OmegaConf.create({"alignment": {"kernel": "torch", "repa": {"depth": 3}}})
    monkeypatch.setattr("hydra.compose", lambda *_: values)
    config = compose(["experiment=demo_repa"])
    assert (config.alignment_kernel, config.alignment["repa"].depth) == ("torch", 3)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["train.stepz=1"], ["train.stepz", "'train.steps'"]),
        (["steps=1"], ["steps", "'train.steps'"]),
        (["+train.stepz=1"], ["'train.steps'"]),
        (["trian.steps=1"], ["'train.steps'"]),
        (["nonsense=1"], ["nonsense", "known: alignment"]),
        (["alignment.repa.wieght=1"], ["alignment.repa.wieght", "'alignment.repa.weight'"]),
        (["alignment.repa={wieght: 1}"], ["'alignment.repa.weight'"]),
        (["alignment=3"], ["group"]),
        (["train=3"], ["group of keys", "train.steps"]),
        (["train.steps={a: 1}"], ["train.steps"]),
        (["train.steps=abc"], ["train.steps=abc", "whole number"]),
        (["train.steps=1.5"], ["train.steps=1.5", "whole number"]),
        (["train.compile=maybe"], ["train.compile=maybe", "true or false"]),
        (["optimizer.betas=[a,b]"], ["optimizer.betas", "list of numbers"]),
        (["ema.decay=high"], ["ema.decay=high", "number"]),
        (["model.name=null"], ["model.name=null", "text"]),
        (["data.path=???"], ["data.path", "needed"]),
        (["data.path=${oc.env:REPA_SCALE_ABSENT}"], ["data.path", "REPA_SCALE_ABSENT"]),
        (["seed=[1"], ["seed=[1", "YAML"]),
        (["experiment=demo_rep"], ["demo_rep", "'demo_repa'"]),
        (["demo_repa"], ["experiment=demo_repa"]),
        (["model.name=SiT-XXL/2"], ["SiT-XXL/2", "'SiT-XL/2'"]),
        (["--multirun"], ["--multirun"]),
        (["--confg", "x"], ["--confg", "'--config'"]),
        (["--config"], ["--config needs a value"]),
        (["--cfg", "hydra"], ["--cfg job"]),
        (["--config", "/absent.yaml"], ["/absent.yaml", "cannot be read"]),
        (["--config", "x.yaml", "experiment=demo_repa"], ["experiment=demo_repa", "x.yaml"]),
    ],
)
def test_a_mistake_is_answered_in_one_line(argv, parts):
    message = refusal(*argv)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train: {steps: [1", "not YAML"),
        ("- 1\n- 2\n", "keys and values"),
        ("train: {stepz: 3}", "'train.steps'"),
        ("train: 3", "group"),
        ("train: {steps: many}", "whole number"),
        ("alignment: {repa: {weight: high}}", "alignment.repa.weight=high"),
    ],
)
def test_a_damaged_file_is_answered_in_one_line(text, part, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    message = refusal("--config", str(file))
    assert part in message and str(file) in message, message


def test_help_and_cfg(capsys, tmp_path):
    assert print_requested(["experiment=demo_repa"]) is False
    assert print_requested(["--help"]) is True
    text = capsys.readouterr().out
    assert "example: repa-scale train" in text and "repa_sit_xl_512" in text and "learning_rate" in text
    assert print_requested(["--cfg", "job", "experiment=demo_repa", "seed=5"]) is True
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert compose(["--config", str(file)]) == compose(["experiment=demo_repa", "seed=5"])


def test_composing_writes_nothing_and_needs_no_torch_and_a_file_needs_no_hydra(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(resolved_yaml(compose(["experiment=demo_repa"])))
    empty = tmp_path / "empty"
    empty.mkdir()
    script = (
        "import sys; from repa_scale.compose import compose; from repa_scale.validation import validate;"
        f"validate(compose(['--config', {str(file)!r}, 'data.path=x', 'method=baseline']), 1);"
        "assert 'hydra' not in sys.modules;"
        "compose(['experiment=demo_repa']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=empty, check=True, timeout=60)
    assert not list(empty.iterdir())


def test_the_documentation_has_every_key_with_its_default():
    rows = {}
    for line in (ROOT / "docs" / "configuration.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `") and len(cells) >= 3 and cells[0].strip("`") not in rows:
            rows[cells[0].strip("`")] = cells[1].strip("`")
    values = _defaults(Config())
    assert set(values) == set(known_keys("NAME"))
    for key, value in values.items():
        shown = {None: "null", True: "true", False: "false", "": "''"}.get(value, value) if _plain(value) else value
        assert rows.get(key) == str(shown).replace(" ", ""), (
            f"{key}: {value!r} in the code, {rows.get(key)!r} in the table"
        )


def _plain(value) -> bool:
    return value is None or isinstance(value, (bool, str))


def _defaults(node, prefix=""):
    values = {}
    for name, value in vars(node).items():
        if name == "alignment_kernel":
            values["alignment.kernel"] = value
        elif name == "alignment":
            values |= _defaults(TermConfig(), "alignment.NAME.")
        elif hasattr(value, "__dataclass_fields__"):
            values |= _defaults(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def test_a_frozen_file_without_omegaconf_is_the_same_configuration(tmp_path, monkeypatch):
    """A bare machine writes RUN/config.yaml without it (docs/gpu.md)."""
    config = compose(["experiment=demo_repa", "data.path=set", "alignment.kernel=torch"])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (name != "omegaconf" and find(name, *rest)) or None
    )
    text = resolved_yaml(config)
    monkeypatch.undo()
    assert text.startswith("{")
    (tmp_path / "config.yaml").write_text(text)
    assert compose(["--config", str(tmp_path / "config.yaml")]) == config
