"""The pretend GPU, built once; its tests are skipped where it cannot be."""

import pytest

from pretend_gpu import build
from pretend_gpu.launch import PretendGpu


@pytest.fixture(scope="session")
def gpu(tmp_path_factory) -> PretendGpu:
    if obstacle := build.obstacle():
        pytest.skip(obstacle)
    return PretendGpu(build.library(), tmp_path_factory.mktemp("pretend_gpu"))
