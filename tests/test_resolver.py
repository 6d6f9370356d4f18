"""pip's resolver finds one environment for a CUDA build of torch and one for a CPU build, under constraints.txt.

A CUDA build asks for one version of Triton and of each CUDA library, a CPU build for none: what is installed here says
nothing about the other build. `torch===VERSION` leaves out local versions such as 2.13.0+cpu.

Asking an index for everything takes minutes where it serves no metadata apart from its wheels (`long`). The quick test
asks for what the builds don't share: the metadata of all that is installed here is copied into a fresh virtual
environment, where pip takes a version that fits as it is, and asks the index for another where it doesn't.
"""

import importlib.metadata as metadata
import re
import subprocess
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
TORCH = re.search(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
CPU_BUILD = "cpu" in (Version(metadata.version("torch")).local or "")
SHOWN = ("torch", "triton", "nvidia-nccl-cu13", "nvidia-dali-cuda130", "numpy", "deepspeed", "mosaicml-streaming")


# pip reads the table of contents at a wheel's end in steps of 10 KiB, a request each: 150 for torch's.
PIP = """
import runpy
import pip._vendor.requests.models as models
models.CONTENT_CHUNK_SIZE = 1 << 20
runpy.run_module("pip", run_name="__main__")
"""


def pip(python, *words):
    return subprocess.run([python, "-c", PIP, *words], capture_output=True, text=True, cwd=ROOT, timeout=280)


def fresh(folder, standing_in=()):
    """The Python of a virtual environment that holds pip and setuptools, and the metadata of what stands in."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python3*/site-packages")
    for name in ("pip", "setuptools", "_distutils_hack"):
        (site / name).symlink_to(find_spec(name).submodule_search_locations[0])
    for name in standing_in:
        found = metadata.distribution(name)
        to = site / f"{re.sub(r'[-_.]+', '_', found.metadata['Name'])}-{found.version}.dist-info"
        to.mkdir()
        for file in ("METADATA", *(["entry_points.txt"] if name == "setuptools" else [])):
            (to / file).write_text(found.read_text(file))
    return folder / "bin" / "python"


def resolve(python, *words):
    """Name -> version of what pip would install, and a line for the end of the output."""
    began = time.perf_counter()
    words = ["install", "--dry-run", *words, "-c", "constraints.txt", ".[all]"]
    done = pip(python, *words, "--use-feature=fast-deps")  # metadata by range requests, where it isn't served apart
    conflict = "ResolutionImpossible" in done.stderr
    if done.returncode and not conflict and pip(python, "index", "versions", "torch").returncode:
        pytest.skip("pip reaches no package index")
    said = [line for line in (done.stderr + done.stdout).splitlines() if not line.startswith("WARNING")]
    assert done.returncode == 0, "\n".join(said[-40:])
    (line,) = re.findall(r"^Would install (.+)$", done.stdout, re.MULTILINE)
    found = dict(each.rsplit("-", 1) for each in line.split())
    kept = dict(re.findall(r"already satisfied: ([\w.-]+).* \((\S+)\)$", done.stdout, re.MULTILINE))
    found, kept = ({canonicalize_name(n): version for n, version in each.items()} for each in (found, kept))
    shown = ", ".join(f"{name} {(kept | found)[name]}" for name in SHOWN if name in kept | found)
    seconds = time.perf_counter() - began
    return found, f"pip {' '.join(words)}: {shown}; {len(kept | found)} packages, {seconds:.0f} s"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The CUDA build's and the CPU build's resolution, at the same time: each mostly waits for answers."""
    folder = tmp_path_factory.mktemp("resolver")
    here = {canonicalize_name(each.metadata["Name"]) for each in metadata.distributions()} - {"repa-scale", "triton"}
    pythons = [fresh(folder / "cuda", here - {"torch"}), fresh(folder / "cpu", here)]
    words = [("--no-build-isolation", torch) for torch in (f"torch==={TORCH}", f"torch=={TORCH}")]
    with ThreadPoolExecutor() as pool:
        return list(pool.map(resolve, pythons, *zip(*words, strict=True)))


def check_cuda_build(found):
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert found["torch"] == TORCH and f"triton=={found['triton']}" in pinned
    assert sum(name.startswith("nvidia-") for name in found) > 10, found


def test_with_a_cuda_build_of_torch(both, record_property):
    found, line = both[0]
    check_cuda_build(found)
    record_property("summary", line)


def test_with_a_cpu_build_of_torch(both, record_property):
    if not CPU_BUILD:
        pytest.skip("this environment has no CPU build of torch to stand in for others")
    found, line = both[1]
    assert not {"torch", "triton"} & set(found), "the CPU build that is here fits, and brings no Triton"
    record_property("summary", line)


@pytest.mark.long
@pytest.mark.parametrize("build", ["cuda", "cpu"])
def test_from_nothing(tmp_path, record_property, build):
    """All of it from the index, as on a new machine."""
    words = ["--ignore-installed", f"torch{'===' if build == 'cuda' else '=='}{TORCH}"]
    found, line = resolve(fresh(tmp_path / "venv"), *words)
    if build == "cuda":
        check_cuda_build(found)
    elif not Version(found["torch"]).local:
        pytest.skip("the indexes of this machine offer no CPU build of torch")
    record_property("summary", line)
