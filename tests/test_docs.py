"""Every command in README and docs is run here, or composes if it needs a cluster; links and names in them exist."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import BIN

from benchmarks import gpu
from repa_scale.cli import VERBS
from repa_scale.compose import compose
from repa_scale.launch import _parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\S*)( \w+)?\n(.*?)```", re.DOTALL)


def blocks(page, language, mark=None):
    return [
        code
        for kind, word, code in FENCE.findall(page.read_text())
        if kind == language and (word or "").strip() == (mark or "")
    ]


def run_as_it_stands(page, folder):
    """Every command of a page, and every piece of Python; how many."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "2"}
    commands, programs = blocks(page, "bash"), blocks(page, "python")
    for block in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{page.name}: {block}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    for block in programs:
        subprocess.run([sys.executable, "-c", block], cwd=folder, env=environment, check=True)
    return len(commands) + len(programs)


@pytest.fixture(scope="module")
def readme_ran(tmp_path_factory):
    """The folder in which README was followed: the pages may use what it made."""
    folder = tmp_path_factory.mktemp("readme")
    assert run_as_it_stands(ROOT / "README.md", folder)
    return folder


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_commands_of_the_readme_run_as_they_stand(readme_ran):
    assert (readme_ran / "runs").is_dir()


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_the_commands_of_the_pages_run_as_they_stand(readme_ran):
    assert sum(run_as_it_stands(page, readme_ran) for page in PAGES if page.name != "README.md") >= 7


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_for_a_cluster_compose(page):
    for block in blocks(page, "bash", "cluster"):
        for line in block.splitlines():
            words = shlex.split(line)
            if "repa_scale.train" in words:
                compose(words[words.index("repa_scale.train") + 1 :])
            elif words and words[0] == "repa-scale":
                assert words[1] in VERBS
            if "launch" in words:
                compose(_parser().parse_known_args(words[words.index("launch") + 1 :])[1])
            elif words[:1] == ["benchmarks/gpu.sh"]:
                gpu_program(words[1:])
            elif words[:1] == ["benchmarks/gpu_wheels.sh"]:
                assert re.fullmatch(r"3\.\d+", words[2]) and os.access(ROOT / words[0], os.X_OK)
            elif "-m" in words and words[words.index("-m") + 1].startswith("benchmarks."):
                assert find_spec(words[words.index("-m") + 1]), line
            elif ".sbatch" in line or ".sh" in line:
                compose([word for word in words if "=" in word and not word.startswith("-")])


def gpu_program(words):
    """The arguments of benchmarks/gpu.sh are those it has; its folders need not exist here."""
    assert words.count("--out") == 1
    places = {words[i + 1] for i, word in enumerate(words) if word in ("--wheels", "--public", "--out")}
    kept = [word for word in words if word not in {"--wheels", "--public", *places} or word == "--out"]
    gpu.parse([*(word for word in kept if word != "--out"), "--out", os.devnull + "/none"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_files_and_targets_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert name in targets, name
    for file in re.findall(r"`((?:repa_scale|tests|docs|launchers|kernels|configs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_the_presets_of_the_readme_are_those_that_exist():
    table = (ROOT / "README.md").read_text().split("## Presets")[1].split("##")[0]
    named = set(re.findall(r"`(\w+)`", table))
    assert named == {path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")}


def test_the_results_are_the_rows_of_the_benchmarks():
    from benchmarks.table import table

    assert table() in (ROOT / "README.md").read_text(), "python -m benchmarks.table prints what README should show"


def test_the_demo_calls_public_verbs_alone():
    script = (ROOT / "launchers" / "local" / "demo.sh").read_text()
    assert set(re.findall(r"^\s*(?:\[.*\] \|\| )?repa-scale (\w+)", script, re.MULTILINE)) <= set(VERBS)
