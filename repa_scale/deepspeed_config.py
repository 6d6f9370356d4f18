"""DeepSpeed's JSON for a run: fills in what the run's configuration says, and refuses contradictions. No torch.

In ds_config.json `"auto"` stands wherever the run's own keys, or the size of its model, decide. docs/configuration.md
gives the reason for every other value.
"""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import repa_scale
from repa_scale.config import Config
from repa_scale.errors import ConfigError
from repa_scale.validation import batch_split

FILE = "ds_config.json"
BUCKET = 50_000_000  # elements; DeepSpeed's 5e8 allocates 1 to 2 GB a rank at start and hides less of the traffic
# What the run's own keys decide: DeepSpeed's sections for them must stay out of the file.
OURS = {"optimizer": "optimizer.*", "scheduler": "optimizer.schedule", "amp": "train.precision"}
OFFLOAD = ("offload_optimizer", "offload_param", "zenflow", "zero_hpz_partition_size")
# DeepSpeed has removed these. It refuses them itself, but only when the engine is built, after the ranks have joined.
MICS = "MiCS; stage 3 shards over all ranks"
REMOVED = {
    "zero_optimization.mics_shard_size": MICS,
    "zero_optimization.mics_hierarchical_params_gather": MICS,
    "zero_optimization.zeropp_loco_param": "LoCo; ZeRO++ works without it",
    "nebula": "Nebula; checkpoint.* decides how the run saves",
    "compression_training": "the compression library",
    "quantize_training": "mixture of quantization",
    "eigenvalue": "mixture of quantization",
    "sparse_gradients": "sparse gradients",
    "sparse_attention": "sparse attention",
    "elasticity": "elastic training; a run resumes on any number of ranks without it",
    "graph_harvesting": "graph harvesting",
    "curriculum_learning": "legacy curriculum learning",
    "progressive_layer_drop": "progressive layer dropping",
}
# Where the user's file is silent and DeepSpeed's default is slow: its throughput timer waits for the device twice per
# micro batch. The run measures its own rate.
IF_ABSENT = {"timers.throughput.enabled": False}


def deepspeed_dict(config: Config, world_size: int, num_parameters: int, device: str) -> dict[str, Any]:
    """The DeepSpeed configuration with every `"auto"` filled in.

    Args:
        world_size: number of ranks.
        num_parameters: of the trained module, projectors included.
        device: `cpu` or `cuda`.

    Raises:
        ConfigError: the file cannot be read, contradicts the run, or holds an `"auto"` that nothing decides.
    """
    name, values = _load(config)
    zero_stage(config)
    _refuse_foreign(name, values)
    run = _run_values(config, world_size)
    for path, (value, key) in run.items():
        given = _get(values, path)
        if given is None or given == "auto":
            _set(name, values, path, value)
        elif given != value or isinstance(given, bool) != isinstance(value, bool):
            raise ConfigError(
                f"{name}: {path}={json.dumps(given)} contradicts {key}, which makes it {json.dumps(value)}; "
                f'write "auto" in the file, or change the key'
            )
    for path, value in _size_values(num_parameters, device).items():
        if _get(values, path) == "auto":
            _set(name, values, path, value)
    for path, value in IF_ABSENT.items():
        if _get(values, path) in (None, "auto"):
            _set(name, values, path, value)
    if left := _autos(values):
        raise ConfigError(f'{name}: {left[0]}="auto" cannot be filled in from the run; give a value or remove it')
    return values


def zero_stage(config: Config) -> int:
    """The ZeRO stage, 1 to 3, that the run's DeepSpeed file asks for.

    Raises:
        ConfigError: the file cannot be read, or has another stage.
    """
    name, values = _load(config)
    stage = _get(values, "zero_optimization.stage")
    if stage not in (1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"{name}: zero_optimization.stage={json.dumps(stage)} must be 1, 2 or 3; use 3")
    return stage


def packaged_file() -> Path:
    """The ds_config.json that this package brings: inside the wheel, or at the root of a checkout."""
    inside = resources.files("repa_scale.configs") / FILE
    return Path(str(inside)) if inside.is_file() else Path(repa_scale.__file__).resolve().parent.parent / FILE


def _load(config: Config) -> tuple[str, dict[str, Any]]:
    """What messages call the file, and what it holds."""
    path = Path(config.deepspeed.config) if config.deepspeed.config else packaged_file()
    name = config.deepspeed.config or FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise ConfigError(f"deepspeed.config={name} cannot be read: {reason}; name a DeepSpeed JSON file") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"deepspeed.config={name} is not JSON: {error.msg} in line {error.lineno}; mend it, or copy {FILE}"
        ) from None
    if not isinstance(values, dict) or not isinstance(values.get("zero_optimization", {}), dict):
        raise ConfigError(f"deepspeed.config={name} does not hold DeepSpeed's keys and sections; copy {FILE}")
    return name, values


def _run_values(config: Config, world_size: int) -> dict[str, tuple[Any, str]]:
    """path in DeepSpeed's file -> (value, the run's key that decides it)."""
    micro, accumulation = batch_split(config, world_size)
    precision = f"train.precision={config.train.precision}"
    batch = f"train.global_batch={config.train.global_batch}"
    split = f"{batch} on {world_size} ranks with train.micro_batch={config.train.micro_batch or 'null'}"
    return {
        "train_batch_size": (config.train.global_batch, batch),
        "train_micro_batch_size_per_gpu": (micro, split),
        "gradient_accumulation_steps": (accumulation, split),
        "gradient_clipping": (config.optimizer.clip, f"optimizer.clip={config.optimizer.clip}"),
        "bf16.enabled": (config.train.precision == "bf16", precision),
        "fp16.enabled": (config.train.precision == "fp16", precision),
    }


def _size_values(num_parameters: int, device: str) -> dict[str, Any]:
    """path in DeepSpeed's file -> the value that follows from the size of the model and the device."""
    bucket = max(1, min(BUCKET, num_parameters))
    keep = 2 * num_parameters  # twice the model: gathered weights stay between the forward and the backward pass
    return {
        "zero_optimization.overlap_comm": device == "cuda",
        "zero_optimization.reduce_bucket_size": bucket,
        "zero_optimization.allgather_bucket_size": bucket,
        "zero_optimization.stage3_prefetch_bucket_size": bucket,
        "zero_optimization.stage3_param_persistence_threshold": 0,
        "zero_optimization.stage3_max_live_parameters": keep,
        "zero_optimization.stage3_max_reuse_distance": keep,
    }


def _refuse_foreign(name: str, values: dict[str, Any]) -> None:
    """Sections that the run's keys own, what the shards cannot work with, and slips of the pen."""
    for section, key in OURS.items():
        if section in values:
            raise ConfigError(
                f"{name}: {section} contradicts {key} of the run, which decides it; remove it from the file"
            )
    for path, what in REMOVED.items():
        *section, key = path.split(".")
        if key in (values.get(section[0], {}) if section else values):
            raise ConfigError(f"{name}: {path} is not supported: DeepSpeed removed it ({what}); delete the key")
    for section in OFFLOAD:
        if values.get("zero_optimization", {}).get(section) not in (None, False, 1):
            raise ConfigError(
                f"{name}: zero_optimization.{section} is not supported: EMA and checkpoints work on each rank's shards "
                f"on the device; remove it"
            )
    template = json.loads(packaged_file().read_text(encoding="utf-8"))
    for section in ("", "zero_optimization"):
        have, known = (values.get(section, {}), template[section]) if section else (values, template)
        for key in have:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.9)
            if key not in known and close and close[0] not in have:
                raise ConfigError(f"{name}: DeepSpeed does not know {key}; did you mean {close[0]!r}?")


def _get(values: dict[str, Any], path: str) -> Any:
    for part in path.split("."):
        if not isinstance(values, dict):
            return None
        values = values.get(part)
    return values


def _set(name: str, values: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {section}={json.dumps(values)} must be a section with {key}; copy {FILE}")
    values[key] = value


def _autos(values: Any, path: str = "") -> list[str]:
    """Paths at which `"auto"` still stands."""
    if not isinstance(values, dict):
        return [path] if values == "auto" else []
    return [found for key, value in values.items() for found in _autos(value, f"{path}.{key}".lstrip("."))]
