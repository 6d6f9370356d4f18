"""What `train.deterministic` sets in torch, in a process that sets nothing else."""

import pytest
import torch

from repa_scale.deterministic import use_deterministic_algorithms


@pytest.fixture
def settings():
    """Puts back what was set before."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def test_algorithms_are_deterministic_and_new_memory_is_not_filled(settings, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    assert not any(torch.empty(1000).isnan().all() for _ in range(8))  # filled, all of it is NaN
