"""The same numbers and pictures for TensorBoard, in RUN/tensorboard."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from repa_scale.errors import reason
from repa_scale.tracking import Tracker, numbers

FOLDER = "tensorboard"

log = logging.getLogger("repa_scale")


class TensorBoardTracker(Tracker):
    """Event files that a thread of TensorBoard's own writer writes.

    What a killed start logged behind its last checkpoint is purged when the run comes by there again, and so are the
    steps behind a rollback.

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / FOLDER
        self._writer: Any = None
        self._last = 0
        self._broken = False

    def log(self, step: int, metrics: dict[str, float], time: float) -> None:
        self._try(lambda: self._log(step, metrics, time))

    def log_artifact(self, path: Path, folder: str) -> None:
        if path.suffix == ".png":
            self._try(lambda: self._log_picture(path, folder))

    def finish(self, state: str) -> None:
        if self._writer is not None:
            self._try(self._writer.close)

    def _log(self, step: int, metrics: dict[str, float], time: float) -> None:
        writer = self._writer_at(step)
        for name, value in numbers(metrics).items():
            writer.add_scalar(name, value, step, walltime=time)

    def _log_picture(self, path: Path, folder: str) -> None:
        import numpy as np
        from PIL import Image

        step = int(path.stem.removeprefix("step_"))
        with Image.open(path) as image:
            self._writer_at(step).add_image(folder, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def _writer_at(self, step: int) -> Any:
        """A writer whose events count from `step` on; a new one after a start or a rollback."""
        if self._writer is None or step < self._last:
            from torch.utils.tensorboard import SummaryWriter

            if self._writer is not None:
                self._writer.close()
            self._writer = SummaryWriter(str(self.folder), purge_step=step)
        self._last = step
        return self._writer

    def _try(self, act) -> None:
        """A sink that fails, on a full disk say, ends no run."""
        if self._broken:
            return
        try:
            act()
        except Exception as error:  # its writer raises many kinds
            self._broken = True
            log.warning("TensorBoard is off from here on: %s", reason(error))
