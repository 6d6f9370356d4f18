"""launchers/kubernetes/jobset.yaml: valid by JobSet's own schema, and its command line trains."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from launching import BIN, free_port

from repa_scale.config import HealthConfig
from repa_scale.errors import ExitCode
from repa_scale.run_folder import read_metrics, read_status

ROOT = Path(__file__).resolve().parents[2]
JOBSET = yaml.safe_load((ROOT / "launchers" / "kubernetes" / "jobset.yaml").read_text())
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
CONTAINER = POD["containers"][0]


def strict(schema):
    """The same schema without room for unknown fields, as `kubectl --validate=strict` has it."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {k: strict(v) for k, v in schema.items()}
    if schema.get("type") == "object" and "properties" in schema:
        changed.setdefault("additionalProperties", bool(schema.get("x-kubernetes-preserve-unknown-fields")))
    if schema.get("x-kubernetes-int-or-string"):
        changed.pop("type", None)
    return changed


def problems(document):
    import jsonschema

    described = json.loads((Path(__file__).parent / "jobset_schema.json").read_text())
    assert (document["apiVersion"], document["kind"]) == (described["apiVersion"], described["kind"])
    schema = strict(described["schema"])
    schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def test_it_is_valid_by_the_schema_of_jobset():
    assert problems(JOBSET) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "rules", 0, "action"), "FailJob"),
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "restartPolice"), "Never"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completions"), "four"),
    ],
)
def test_the_schema_finds_mistakes(path, value):
    broken = json.loads(json.dumps(JOBSET))
    place = broken
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert problems(broken)


def test_its_numbers_fit_each_other():
    words = dict(word.lstrip("-").split("=", 1) for word in CONTAINER["args"] if "=" in word)
    assert int(words["num_nodes"]) == JOB["parallelism"] == JOB["completions"]
    assert int(words["num_gpus"]) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert words["master_addr"] == f"{JOBSET['metadata']['name']}-node-0-0.{JOBSET['metadata']['name']}"
    grace = float(words["health.grace_seconds"])
    assert grace >= HealthConfig().grace_seconds and POD["terminationGracePeriodSeconds"] > grace + 60
    mounted = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounted == {volume["name"] for volume in POD["volumes"]}
    assert not any("secret" in json.dumps(each).lower() for each in CONTAINER["env"]), "secrets come as files"


def test_the_failure_policy_knows_our_exit_codes():
    """Kubernetes says `Container C for pod P failed with exit code N matching FailJob rule at index I`."""
    rules = JOBSET["spec"]["failurePolicy"]["rules"]
    told = {code for rule in JOB["podFailurePolicy"]["rules"] for code in rule.get("onExitCodes", {}).get("values", ())}

    def action(code):
        message = f"Container trainer for pod a/b failed with exit code {code} matching FailJob rule at index 0"
        if code not in told:
            message = "Job has reached the specified backoff limit"
        found = [r["action"] for r in rules if any(re.search(p, message) for p in r["onJobFailureMessagePatterns"])]
        return found[0] if found else "RestartJobSet"

    assert action(ExitCode.BAD_INPUT) == action(ExitCode.DIVERGED) == "FailJobSet"
    assert action(ExitCode.PREEMPTED) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(ExitCode.FAILED) == action(137) == "RestartJobSet"


@pytest.mark.distributed
def test_its_command_line_trains(digits, tmp_path):
    """The pods' own command and words, as two pods of one GPU each, with what cannot be here replaced."""
    (tmp_path / "deepspeed_env").write_text("# a secret\nHF_TOKEN='hf_of_a_test'\n")
    port = free_port()
    put = {
        "--num_nodes": "2",
        "--num_gpus": "1",
        "--master_addr": "127.0.0.1",
        "--master_port": str(port),
        "experiment": "demo_baseline",
        "data.path": str(digits),
        "run.dir": str(tmp_path / "run"),
        "train.micro_batch": "4",
        "tracking.uri": "none",
    }
    small = ["model.name=SiT-Nano/2", "train.global_batch=8", "train.steps=2", "train.log_every=1"]
    small += ["train.sample_every=0", "data.workers=0"]
    pods = []
    for index in ("0", "1"):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", index) for word in CONTAINER["args"]]
        words = [f"{k}={put.get(k, v)}" if e else k for k, e, v in (word.partition("=") for word in words)]
        pods.append(
            subprocess.Popen(
                [BIN / CONTAINER["command"][0], *CONTAINER["command"][1:], *words, *small],
                cwd=tmp_path,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "DS_ACCELERATOR": "cpu",
                    "DS_ENV_FILE": str(tmp_path / "deepspeed_env"),
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [pod.communicate(timeout=150)[0] for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [pod.returncode for pod in pods] == [0, 0], outputs
    assert read_status(tmp_path / "run")["state"] == "completed" and len(read_metrics(tmp_path / "run")) == 2
