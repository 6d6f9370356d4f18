"""The image's recipe: pinned, not root, and what it copies is enough to install from."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(name):
    return re.sub(r"\\\n\s*", "", (ROOT / "launchers" / "docker" / name).read_text()).splitlines()


LINES = read("Dockerfile")
SERVE = read("Dockerfile.serve")


def arguments(instruction, lines=LINES):
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(f"{instruction} ")]


def test_the_base_is_pinned_and_its_cuda_is_that_of_the_wheels():
    (base,) = [each.partition("=")[2] for each in arguments("ARG") if each.startswith("BASE=")]
    cuda = re.fullmatch(r"nvidia/cuda:(\d+)\.(\d+)\.\d+-base-ubuntu24\.04", base)
    assert cuda and arguments("FROM") == ["${BASE}"]
    assert f"nvidia-dali-cuda{cuda[1]}{cuda[2]}" in (ROOT / "pyproject.toml").read_text()


def test_every_package_is_pinned():
    installs = [part for run in arguments("RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 5 and all("-c constraints.txt" in part for part in installs)


def test_deepspeed_is_built_as_on_a_machine_without_a_gpu():
    """Everywhere: its set-up fails where there is a GPU and no CUDA toolkit, and the wheel is the same."""
    places = ["README.md", "launchers/docker/Dockerfile", "launchers/local/setup.sh", "benchmarks/gpu_wheels.sh"]
    for place in places:
        lines = [line for line in (ROOT / place).read_text().splitlines() if "DS_BUILD_OPS=0" in line]
        assert lines and all("DS_ACCELERATOR=cpu pip" in line for line in lines), place


def test_nothing_runs_as_root_in_it():
    assert int(arguments("USER")[-1]) > 0
    last = max(number for number, line in enumerate(LINES) if line.startswith("USER "))
    assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in LINES[last:])


def test_what_it_copies_is_there_and_enough_to_install(tmp_path):
    """Copied as the image would, .dockerignore included; then pip installs it with nothing else at hand."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    tree = tmp_path / "tree"
    tree.mkdir()
    for copy in arguments("COPY"):
        for name in copy.split()[:-1]:
            assert name in allowed, f".dockerignore hides {name}"
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", tmp_path / "to", tree]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for file in ("configs/ds_config.json", "configs/experiment/repa_sit_xl.yaml", "kernels/cosine.py", "doctor/node.py",
                 "launchers/docker/Dockerfile", "launchers/slurm/train.sbatch"):  # fmt: skip
        assert (tmp_path / "to" / "repa_scale" / file).is_file(), file


def test_the_image_for_serving_is_the_same_but_for_training():
    for instruction in ("ARG", "FROM", "COPY", "USER"):
        assert arguments(instruction, SERVE) == arguments(instruction), instruction
    installs = [part for run in arguments("RUN", SERVE) for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3 and all("-c constraints.txt" in part for part in installs)
    assert installs[-1].strip().endswith("'.[serve]'")
    last = max(number for number, line in enumerate(SERVE) if line.startswith("USER "))
    assert not any(line.startswith(("RUN", "COPY", "ADD")) for line in SERVE[last:])


def test_the_image_for_serving_starts_with_words_that_the_verb_has():
    """The container's command, with a folder that is not there: a line, not a complaint about its options."""
    entry, command = (json.loads(arguments(each, SERVE)[-1]) for each in ("ENTRYPOINT", "CMD"))
    assert entry[0] == "repa-scale"
    words = [*entry[1:], *command]
    words[words.index("--port") + 1] = "0"
    done = subprocess.run([sys.executable, "-m", "repa_scale", *words], capture_output=True, text=True)
    assert done.returncode == 64 and "/model is not" in done.stderr, done.stderr
