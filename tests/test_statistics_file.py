"""Statistics of real images come back from their file as they were written, or not at all."""

import numpy as np
import pytest
import torch

from repa_scale.metrics.frechet import Moments
from repa_scale.statistics_file import read_statistics, statistics_name, write_statistics


@pytest.fixture
def written(tmp_path):
    """The file, and what was written."""
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    moments = {"pool": Moments.of(rows), "spatial": Moments.of(rows[:, :3])}
    write_statistics(tmp_path / "file.npz", moments, {"pool": rows[:7]})
    return tmp_path / "file.npz", moments, rows[:7]


def test_they_come_back_bit_by_bit(written):
    file, moments, rows = written
    found, kept = read_statistics(file)
    assert set(found) == set(moments) and set(kept) == {"pool"} and torch.equal(kept["pool"], rows)
    for part, one in moments.items():
        assert found[part].count == one.count == 20
        assert torch.equal(found[part].mean, one.mean) and torch.equal(found[part].scatter, one.scatter)
    with np.load(file) as arrays:  # readable by numpy too
        assert np.array_equal(arrays["mean_pool"], moments["pool"].mean.numpy())
    assert [path.name for path in file.parent.iterdir()] == ["file.npz"]


def test_damage_anywhere_is_seen(written, caplog):
    file, *_ = written
    data = file.read_bytes()
    for place in [*range(0, len(data), 13), len(data) - 1]:
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert read_statistics(file) is None, place
    for length in (0, 5, 32, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert read_statistics(file) is None, length
    assert "is damaged; its statistics are made again" in caplog.text
    file.write_bytes(data)
    assert read_statistics(file) is not None


def test_a_file_of_another_version_or_none_is_none(tmp_path, caplog):
    assert read_statistics(tmp_path / "none.npz") is None and not caplog.text
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert read_statistics(tmp_path / "other.npz") is None


def test_the_name_changes_with_each_part_of_the_essence():
    names = {statistics_name("x", *essence) for essence in (("a", "b", 1), ("a", "b", 2), ("a", "c", 1), ("ab", "", 1))}
    assert len(names) == 4 and statistics_name("x", "a", "b", 1) in names
