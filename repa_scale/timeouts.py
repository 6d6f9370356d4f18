"""How long each wait of a run may take, in one place and in order. No torch.

What waits inside gives up first, with a message of its own: the data loader before the watchdog, the watchdog before
the collective that a hang keeps open. `tests/test_timeouts.py` holds the order against the modules that wait.
"""

from __future__ import annotations

from repa_scale.config import HealthConfig

JOIN = 1800.0  # until all ranks have come
TELL = 60.0  # that a rank which cannot join gives the others to hear of it
CONNECT = 300.0  # until the hosts of ranks that have all come are connected
HOST = 14 * 86400.0  # of the host group: barriers and objects wait for a restore, or for the slowest rank of `prepare`
LOADER = 600.0  # without a batch the loader is taken for dead (data/batches.py)
UPLOAD = 900.0  # that the end of a run gives its last checkpoint's upload
FIRST = 1800.0  # watchdog: deadline of a phase without a past
FACTOR = 10.0  # watchdog: of a phase with one, times its longest of late
SAVER = 2400.0  # a checkpoint waits for the other ranks' files
LONGEST = 3000.0  # watchdog: a learned deadline is not longer
MARGIN = 60.0  # of a watchdog's deadline over the patience inside the phase

# Every phase of the watchdog, with the longest wait inside that ends by itself.
PATIENCE = {
    "start-up": 0.0,
    "data": LOADER,
    "forward": 0.0,
    "backward": 0.0,
    "optimizer": 0.0,
    "record": 0.0,
    "save": SAVER,  # of the save before
    "waiting save": SAVER,  # each try; and health.grace_seconds
    "sample": 0.0,
    "reference": 0.0,
    "evaluate": 0.0,
    "metrics": 0.0,
    "rollback": SAVER,  # of the save in flight
    "finish": UPLOAD + MARGIN,  # and the tracker's last rows
}


def floor(phase: str, settings: HealthConfig) -> float:
    """Seconds below which no deadline of `phase` lies; 0: `health.hang_seconds` alone decides."""
    patience = PATIENCE[phase]
    if phase == "waiting save":
        patience = max(patience, settings.grace_seconds)
    return patience + MARGIN if patience else 0.0


def deadline(phase: str, longest: float | None, settings: HealthConfig) -> float:
    """Seconds after which the watchdog ends a rank in `phase`.

    Args:
        longest: seconds that the phase took of late, at most; None: it comes for the first time.
    """
    learned = FIRST if longest is None else min(FACTOR * longest, LONGEST)
    return max(settings.hang_seconds, floor(phase, settings), learned)


def collectives(hang_seconds: float = 0.0) -> float:
    """Seconds after which NCCL and gloo abort a collective: the watchdog has spoken before, whatever it has learned."""
    return max(LONGEST, hang_seconds) + 10 * MARGIN
