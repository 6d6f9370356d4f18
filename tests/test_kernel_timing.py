"""How the kernel benchmark times: on a made-up GPU with a clock, and a launch queue that stops the host when full."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import kernel_timing

HOST, KERNEL, CLOCK = 4e-6, 1e-6, 1e9  # seconds of a launch and of a kernel; cycles per second of `_sleep`
QUEUE = 1000  # launches that CUDA takes ahead


class MadeUp:
    """A host that launches one kernel in HOST seconds, and a device that runs them one after the other."""

    def __init__(self) -> None:
        self.now = 0.0  # of the host
        self.ends: list[float] = []  # of everything that was ever put into the queue

    def launch(self, seconds: float = KERNEL) -> float:
        self.now += HOST
        if len(self.ends) >= QUEUE:
            self.now = max(self.now, self.ends[-QUEUE])
        self.ends.append(max(self.now, self.ends[-1] if self.ends else 0.0) + seconds)
        return self.ends[-1]

    def wait(self, *_) -> None:
        self.now = max([self.now, *self.ends[-1:]])

    def event(self, **_) -> SimpleNamespace:
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.launch(0.0))
        event.query = lambda: self.now >= event.at
        event.synchronize = self.wait
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.fixture
def gpu(monkeypatch):
    made_up = MadeUp()
    monkeypatch.setattr(time, "perf_counter", lambda: made_up.now)
    monkeypatch.setattr(torch.cuda, "Event", made_up.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made_up.launch(cycles / CLOCK))
    monkeypatch.setattr(torch.cuda, "synchronize", made_up.wait)
    monkeypatch.setattr(kernel_timing, "cycles_per_second", lambda device: CLOCK)
    return made_up


@pytest.mark.parametrize(("launches", "host_bound"), [(3, False), (400, False), (3000, True)])
def test_the_hosts_time_is_without_the_sleep_and_the_devices_without_the_launching(gpu, launches, host_bound):
    def work(inputs):
        for _ in range(launches):
            gpu.launch()
        return torch.zeros(())

    found = kernel_timing.timed(work, [{"x": torch.zeros(())}], torch.device("cuda"), 5, backward=False)
    assert found.host_bound == host_bound and found.rounds == 5
    assert found.host_seconds == pytest.approx(launches * HOST, rel=0.05)
    expected = launches * HOST + KERNEL if host_bound else launches * KERNEL
    assert found.seconds == pytest.approx(expected, rel=0.05)
