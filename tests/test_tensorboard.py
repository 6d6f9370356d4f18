"""The TensorBoard sink, read back by TensorBoard itself."""

import importlib.util
import math

import numpy as np
import pytest

from repa_scale.config import Config
from repa_scale.errors import UserError
from repa_scale.pictures import save_sheet
from repa_scale.tracking import check_installed, open_tracker


def config():
    config = Config()
    config.tracking.uri, config.tracking.tensorboard = "none", True
    return config


def test_what_is_not_installed_is_one_pip_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'repa-scale\[tensorboard\]'"):
        check_installed(config())
    with pytest.raises(UserError, match=r"pip install 'repa-scale\[track\]'"):
        check_installed(Config())


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_scalars_and_pictures_arrive_and_repeated_steps_replace_the_lost_ones(tmp_path):
    """A start that was killed behind step 4 goes on from step 2, and is rolled back from 6 to 4."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = open_tracker(config(), tmp_path, {}, None)
    for step in (1, 2, 3, 4):
        first.log(step, {"loss": 10.0 + step, "grad_norm": math.inf if step == 2 else 1.0}, 1000.0 + step)
    first.trackers[1]._writer.flush()  # then it is killed
    second = open_tracker(config(), tmp_path, {}, None)
    for step in (3, 4, 5, 6, 5, 6):
        second.log(step, {"loss": 20.0 + step}, 2000.0 + step)
    (tmp_path / "samples").mkdir()
    picture = tmp_path / "samples" / "step_00000006.png"
    save_sheet(np.full((4, 8, 8, 3), 200, np.uint8), picture)
    second.log_artifact(picture, "samples")
    second.log_artifact(tmp_path / "config.yaml", "")
    second.finish("completed")

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == {1: 11.0, 2: 12.0, 3: 23.0, 4: 24.0, 5: 25.0, 6: 26.0}
    assert len(events.Scalars("loss")) == 6
    assert [e.step for e in events.Scalars("grad_norm")] == [1], "what is not finite is left out, what was lost is gone"
    assert [e.step for e in events.Images("samples")] == [6]
    assert events.Scalars("loss")[2].wall_time == 2003.0


def test_a_sink_that_fails_ends_no_run(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    tracker = open_tracker(config(), tmp_path, {}, None)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0}, 1.0)
    tracker.finish("completed")
    assert caplog.text.count("TensorBoard is off") == 1
