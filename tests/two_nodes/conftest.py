"""The two nodes (nodes.py), for the tests here; skipped with the reason where this machine cannot hold them."""

import pytest
from nodes import TwoNodes, why_not


@pytest.fixture(scope="session")
def nodes(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    with TwoNodes(tmp_path_factory.mktemp("two_nodes")) as pair:
        yield pair
