"""The training process of a launched job: takes up what the guard brought to this node, then trains."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from repa_scale.launch.places import CONFIG_FILE, JOB_FILE, STOPPED_BEFORE_START, write_private


def main(argv: list[str]) -> int:
    """argv: the job's folder on this node."""
    folder = Path(argv[0])
    # Until the trainer takes over (health.StopRequest): there is nothing to save yet.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(STOPPED_BEFORE_START))
    job = json.loads((folder / JOB_FILE).read_text())
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    from repa_scale.errors import OUTCOME_VARIABLE
    from repa_scale.launch.environment import secrets
    from repa_scale.redact import never_show

    never_show(secrets(job["environment"]))
    os.environ[OUTCOME_VARIABLE] = str(folder)
    rank = os.environ["RANK"]
    write_private(folder / f"rank_pid_{rank}.json", json.dumps({"pid": os.getpid()}))
    sys.argv = ["repa-scale launch", *job["words"]]
    from repa_scale.train import main as train

    return train(["--config", str(folder / CONFIG_FILE)])


if __name__ == "__main__":
    from repa_scale.processes import end_process

    end_process(main(sys.argv[1:]))
