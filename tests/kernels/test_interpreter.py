"""Every kernel against its float64 reference, on small shapes, in Triton's interpreter (kernel_cases.py)."""

import pytest
from kernel_cases import small_cases
from repa_scale.kernels.ahead_of_time import variants


@pytest.mark.parametrize("case", small_cases())
def test_case(interpreted, case):
    assert not interpreted[case], interpreted[case]


def test_everything_that_was_started_is_built_ahead_of_time(interpreted):
    """The list of variants is made by hand from the table; what the library really starts must be on it."""
    listed = {variant.key for variant in variants(complete=True)}
    started = {(name, tuple(pointers), *tile) for name, pointers, *tile in interpreted["launches"]}
    assert {name for name, *_ in started} == {key[0] for key in listed}
    assert started <= listed, sorted(started - listed)
