"""Runs `repa_scale.train` with faults laid in it: FAULTS is a JSON list of [name, rank, step, ...].

Each fault is real where it strikes: the process kills or stops itself, a gradient becomes NaN, a batch is poisoned. A
fault whose file FAULTS_ONCE/NAME exists has struck before and is left out.
"""

import functools
import json
import os
import signal
import time
from pathlib import Path

RANK = int(os.environ.get("RANK", 0))


def strikes_once(name):
    """False where this fault struck in an earlier start, if FAULTS_ONCE asks for that."""
    folder = os.environ.get("FAULTS_ONCE")
    if not folder:
        return True
    try:
        Path(folder, f"{name}-{RANK}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def after(module, name, action):
    """Calls `action(*args)` before each call of a function; what it returns, if not None, is returned instead."""
    original = getattr(module, name)

    @functools.wraps(original)
    def changed(*args, **kwargs):
        value = action(*args, **kwargs)
        return original(*args, **kwargs) if value is None else value

    setattr(module, name, changed)


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def kill_in_shard(step):
    """In the middle of this rank's file."""
    from repa_scale import saving

    def action(folder, rank, world, pieces):
        if f"{step:08d}" in folder.name and strikes_once("kill_in_shard"):
            (folder / f"rank_{rank:05d}_of_{world:05d}.safetensors").write_bytes(b"\0" * 4096)
            die()

    after(saving, "write_pieces", action)


def kill_at_file(step, name):
    """Rank 0, when it is about to write `manifest.json` or `latest` of the checkpoint; half of the text is there."""
    from repa_scale import checkpoint

    def action(path, text):
        here = f"{step:08d}" in f"{path}{text if name == 'latest' else ''}"
        if path.name == name and here and strikes_once(f"kill_at_{name}"):
            path.with_name(f"{path.name}.tmp-{os.getpid()}").write_text(text[: len(text) // 2])
            die()

    after(checkpoint, "write_atomically", action)


def slow_write(seconds):
    from repa_scale import saving

    after(saving, "write_pieces", lambda *_: time.sleep(seconds))


def at_step(step, action, name):
    from repa_scale.trainer import Trainer

    def check(self, number, *_):
        if number == step and strikes_once(name):
            action(self)

    after(Trainer, "step", check)


def stop_self(step):
    at_step(step, lambda _: os.kill(os.getpid(), signal.SIGSTOP), "stop_self")


def save_again(step):
    """Saves the state as it was taken up, before step `step` changes it."""
    at_step(step, lambda trainer: trainer.save(step - 1, wait=True), "save_again")


def kill(step):
    at_step(step, lambda _: die(), "kill")


def crash(step):
    def action(_):
        raise RuntimeError("laid by the test")

    at_step(step, action, "crash")


def jump_clock(step):
    """The wall clock goes an hour on, in this process."""
    real = time.time

    def action(_):
        time.time = lambda: real() + 3600.0
        time.sleep(1.5)  # in this phase, so that whoever watches it looks at the clock

    at_step(step, action, "jump_clock")


def marked(predicate, name, change):
    """Changes what `Engine.backward` gets while a batch for which `predicate(step, batch)` holds is trained on."""
    from repa_scale.engine import Engine
    from repa_scale.trainer import Trainer

    state = {"on": False}

    def note(self, number, batch, *_):
        state["on"] = bool(predicate(number, batch)) and strikes_once(f"{name}-{number}")

    after(Trainer, "step", note)
    original = Engine.backward
    Engine.backward = lambda self, loss: original(self, change(loss) if state["on"] else loss)


def nan(first, last):
    """The gradient of these batches (counted from 1 in the endless order) is NaN on this rank."""

    def bad(step, batch):
        return first <= number_of(batch) <= last

    marked(bad, "nan", lambda loss: loss * float("nan"))


def poison(number):
    """The targets of this batch are ten times too large in square."""
    from repa_scale import trainer

    state = {"on": False}
    after(trainer.Trainer, "step", lambda self, step, batch, *_: state.update(on=number_of(batch) == number))
    original = trainer.Interpolant.__call__

    def changed(self, *args):
        x_t, velocity = original(self, *args)
        return x_t, velocity * 4.0 if state["on"] else velocity

    trainer.Interpolant.__call__ = changed


def number_of(batch):
    """The number of a batch in the endless order, from 1; the tests use global batches of 8."""
    return int(batch.index.min()) // 8 + 1


def slow_rank(seconds):
    from repa_scale import trainer

    original = trainer.Frozen.__init__

    def init(self, *args):
        original(self, *args)
        encode = self.latents.encode
        self.latents.encode = lambda images: (time.sleep(seconds), encode(images))[1]

    trainer.Frozen.__init__ = init


def slow_data(step, seconds):
    from repa_scale.data import batches

    after(batches.Steps, "__getitem__", lambda self, number: time.sleep(seconds) if number == step - 1 else None)


def impatient():
    """No phase has a floor: a hang is told after health.hang_seconds, also where something inside would give up."""
    from repa_scale import timeouts

    timeouts.PATIENCE.update(dict.fromkeys(timeouts.PATIENCE, 0.0))


def slow_sampling(seconds):
    from repa_scale import sample_grid

    after(sample_grid, "sample_numbered", lambda *_: time.sleep(seconds))


def stop_in_sampling(call):
    """Someone asks this rank to stop while it draws its block number `call`."""
    from repa_scale import sample_grid

    calls = []

    def action(*_):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)

    after(sample_grid, "sample_numbered", action)


def no_dali():
    """DALI's pipeline cannot be built on this rank."""
    from repa_scale.data import dali

    def action(*_):
        raise RuntimeError("laid by the test")

    after(dali, "_pipeline", action)


def choose_as_on_a_gpu():
    """The decoder is chosen as if this rank worked on the first GPU."""
    from dataclasses import replace

    import torch

    from repa_scale.data.decoder_choice import Decoders

    found = Decoders.found
    device = torch.device("cuda", 0)
    Decoders.found = lambda wanted, ranks, *rest: found(wanted, replace(ranks, device=device), *rest)


def lay():
    for name, rank, *arguments in json.loads(os.environ["FAULTS"]):
        if rank in (RANK, "all"):
            globals()[name](*arguments)


if __name__ == "__main__":
    from repa_scale.processes import end_process
    from repa_scale.train import main

    lay()
    end_process(main())
