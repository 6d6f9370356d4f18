"""The form `mlflow`: a pyfunc model from code and programs, without pickles, and its entry in a model registry."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import repa_scale
from repa_scale import evaluations
from repa_scale.errors import UserError, reason, require
from repa_scale.export import Options
from repa_scale.export.step import build_step
from repa_scale.export.torch_export import worst, write_programs
from repa_scale.redact import redacted
from repa_scale.run_folder import read_metrics
from repa_scale.tracking import mlflow_client, numbers
from repa_scale.trained import Source

PACKAGE = Path(repa_scale.__file__).parent
CODE = PACKAGE / "export" / "mlflow_model.py"  # run by MLflow, so not imported here
REQUIREMENTS = ("mlflow", "numpy", "pillow", "torch")
METRICS = "metrics.jsonl"
DEFAULT_URI = "sqlite:///mlflow.db"  # of tracking.uri too


def write(source: Source, folder: Path, options: Options) -> dict[str, Any]:
    """A folder that `mlflow models serve -m` and `mlflow.pyfunc.load_model` take.

    Raises:
        UserError: mlflow is missing, or a program differs from PyTorch by more than its bound.
    """
    require("mlflow", "track")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as temporary:
        programs, code = Path(temporary, "programs"), Path(temporary, "repa_scale")
        programs.mkdir()
        facts = write_programs(source, programs, options, build_step(source, options))
        sample = source.config.sample
        described = {
            **{key: facts[key] for key in ("latent_shape", "num_classes", "path")},
            "sampler": {key: getattr(sample, key) for key in ("sampler", "steps", "guidance", "interval")},
            "class_names": list(source.class_names),
        }
        (programs / "model.json").write_text(json.dumps(described, indent=1) + "\n")
        copy_room(("arithmetic", "rng", "errors", "sampling"), code)
        _save(folder, programs, code, source, described["sampler"])
    return facts | worst(facts["checks"]) | {"requirements": requirements()}


def requirements() -> list[str]:
    """What the model needs, as it was tested: no package for training."""
    return [f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def copy_room(rooms: tuple[str, ...], to: Path) -> None:
    """Files of this package and what they import of it, so that a model brings the very sampler of the trainer."""
    wanted, found = ["__init__", *rooms], set()
    while wanted:
        room = wanted.pop()
        if room in found:
            continue
        found.add(room)
        text = (PACKAGE / f"{room}.py").read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "repa_scale":
                inner = node.module.partition(".")[2]
                wanted += [inner] if inner else [n.name for n in node.names if (PACKAGE / f"{n.name}.py").is_file()]
    to.mkdir(parents=True)
    for room in found:
        shutil.copyfile(PACKAGE / f"{room}.py", to / f"{room}.py")


def register(source: Source, folder: Path, options: Options, made: dict[str, Any]) -> None:
    """Uploads the model beside the run's own record, or a new one, and makes it a version of `options.register`.

    Raises:
        UserError: the store does not answer, or refuses.
    """
    uri = options.uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")  # a model is larger than a row of metrics
    try:
        client = mlflow_client(uri)
        run_id = _run_of(client, source)
        found = evaluations.read(source.run) if source.run else []
        measured = {e.name: e.value for e in found if e.step == source.facts["step"]}
        for name, value in measured.items():
            client.log_metric(run_id, name, value, step=source.facts["step"])
        place = f"models/step_{source.facts['step']:08d}_{source.facts['weights']}_{options.dtype}"
        client.log_artifacts(run_id, str(folder), place)
        if not any(model.name == options.register for model in client.search_registered_models()):
            client.create_registered_model(options.register)
        facts = {**source.facts, "dtype": options.dtype, "max_error": made["max_error"], **measured}
        version = client.create_model_version(
            options.register,
            f"{client.get_run(run_id).info.artifact_uri}/{place}",
            run_id,
            tags={key: str(value) for key, value in facts.items() if value is not None},
        )
        if options.alias:
            client.set_registered_model_alias(options.register, options.alias, version.version)
    except Exception as error:  # MLflow, requests and SQLAlchemy raise many kinds
        raise UserError(f"--register {options.register} at {redacted(uri)}: {redacted(reason(error))}") from None
    alias = f"@{options.alias}" if options.alias else f"/{version.version}"
    print(f"registered: models:/{options.register}{alias} (version {version.version}, run {run_id})")


def _run_of(client: Any, source: Source) -> str:
    """The training run's record in this store, else a new one with its last numbers."""
    from mlflow.exceptions import MlflowException

    if known := source.facts.get("mlflow_run_id"):
        try:
            return client.get_run(known).info.run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    name = source.config.tracking.experiment
    experiment = client.get_experiment_by_name(name)
    identifier = experiment.experiment_id if experiment else client.create_experiment(name)
    tags = {key: str(value) for key, value in source.facts.items() if value is not None}
    run_id = client.create_run(identifier, run_name=f"export-step-{source.facts['step']}", tags=tags).info.run_id
    rows = read_metrics(source.run) if source.run and (source.run / METRICS).is_file() else []
    for key, value in numbers(rows[-1] if rows else {}).items():
        client.log_metric(run_id, key, value, step=rows[-1]["step"])
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _save(folder: Path, programs: Path, code: Path, source: Source, sampler: dict[str, Any]) -> None:
    import mlflow
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema(
            [
                ColSpec("long", "class_label"),
                ColSpec("long", "seed", required=False),
                ColSpec("long", "steps", required=False),
                ColSpec("double", "guidance", required=False),
            ]
        ),
        outputs=Schema([ColSpec("string", "png_base64")]),
        params=ParamSchema(
            [
                ParamSpec("sampler", "string", sampler["sampler"]),
                ParamSpec("interval", "double", [float(t) for t in sampler["interval"]], shape=(-1,)),
            ]
        ),
    )
    example = pd.DataFrame(
        {"class_label": [0], "seed": [0], "steps": [sampler["steps"]], "guidance": [float(sampler["guidance"])]}
    )
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            folder,
            python_model=str(CODE),
            artifacts={"programs": str(programs)},
            code_paths=[str(code)],
            signature=signature,
            input_example=example,
            pip_requirements=requirements(),
            metadata={key: value for key, value in source.facts.items() if value is not None},
        )
    # MLflow notes where the parts came from, on this machine; it finds them by their names.
    told = (folder / "MLmodel").read_text()
    told = told.replace(str(CODE), CODE.name).replace(str(programs), f"artifacts/{programs.name}")
    (folder / "MLmodel").write_text(told)
