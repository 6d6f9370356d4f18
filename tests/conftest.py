"""What all tests share: GPU tests skip without a GPU, and the folders of golden numbers and of real images.

With REPA_SCALE_REHEARSE=1 GPU tests run on the CPU, as a rehearsal of benchmarks/gpu.sh. The program itself sets
BENCHMARK_OUT: there a GPU test without a GPU fails, as one that skipped would count as passed.
"""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REHEARSAL = os.environ.get("REPA_SCALE_REHEARSE") == "1"


def pytest_configure(config):
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which a bare machine may lack")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or REHEARSAL or os.environ.get("BENCHMARK_OUT"):
        return
    for item in items:
        if item.get_closest_marker("gpu"):  # not its keywords, which name the folders above it too
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter):
    """Lines that tests gave to the end of the output, with `record_property("summary", line)`."""
    for report in terminalreporter.stats.get("passed", []):
        for name, line in report.user_properties:
            if name == "summary":
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def gpu() -> str:
    """The device of GPU tests."""
    return "cpu" if REHEARSAL else "cuda"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    """`REPA_SCALE_GOLDEN`, or the numbers that the repository brings."""
    return Path(os.environ.get("REPA_SCALE_GOLDEN", ROOT / "tests" / "golden"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real images that are not part of the repository (CIFAR-10, ImageNet samples)."""
    folder = Path(os.environ.get("REPA_SCALE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: it holds real images that the repository may not bring")
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The scikit-learn digits as a prepared data set."""
    from repa_scale.prepare import main

    folder = tmp_path_factory.mktemp("data") / "digits"
    assert main(["digits", "--out", str(folder), "--size", "8"]) == 0
    return folder
