"""Where ranks meet without torchrun: a port that is taken, a rank 0 that comes late, Ctrl-C meanwhile."""

import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
from launching import free_port

from repa_scale import rendezvous
from repa_scale.errors import UserError
from repa_scale.rendezvous import meeting_store

LONG = timedelta(seconds=30)


@pytest.fixture
def port(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "SLICE", timedelta(seconds=0.5))
    port = free_port()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return port


def test_a_port_of_another_program_is_one_line(port):
    with socket.create_server(("", port)), pytest.raises(UserError, match=f"MASTER_PORT={port} is taken .*master_port"):
        meeting_store(0, 2, LONG)


def test_a_late_rank_0_is_waited_for(port):
    kept = []
    late = threading.Timer(1.5, lambda: kept.append(meeting_store(0, 2, LONG)))
    late.start()
    store = meeting_store(1, 2, LONG)
    late.join()
    store.set("a", "b")
    assert kept[0].get("a") == b"b"


def test_ctrl_c_ends_the_wait_for_rank_0(port):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    began = time.monotonic()
    threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            meeting_store(1, 2, LONG)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 15
