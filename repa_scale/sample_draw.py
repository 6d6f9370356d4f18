"""Draws the blocks of samples that are missing, by threads of all processes, with progress. The rest is sample.py's."""

from __future__ import annotations

import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import torch

from repa_scale import arithmetic
from repa_scale.config import SampleConfig
from repa_scale.errors import DataError, UserError
from repa_scale.health import StopRequest
from repa_scale.latents import Latents
from repa_scale.progress import progress_bar
from repa_scale.ranks import Ranks
from repa_scale.sample_blocks import Blocks
from repa_scale.sample_recipe import Recipe
from repa_scale.sampling import sample_numbered
from repa_scale.sizes import latent_grid
from repa_scale.trained import Trained

LOOK_SECONDS = 0.5  # between looks at the blocks of all processes
TELL_SECONDS = 60.0  # between lines where there is no terminal
PATIENCE = 30.0  # seconds for the last blocks of other machines to be seen in a shared folder
# Of Inductor: what it would choose by timing on the machine decides in which order a reduction sums. Settings of the
# environment that would have it time all the same are overruled.
REPRODUCIBLE = {
    "deterministic": True,
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "benchmark_fusion": False,
    "benchmark_epilogue_fusion": False,
}


class Drawer:
    """Draws blocks by a recipe, each a function of the recipe and its number alone."""

    def __init__(self, trained: Trained, recipe: Recipe, latents: Latents, device: torch.device) -> None:
        self.recipe, self.latents, self.device = recipe, latents, device
        config = trained.config
        self.shape = latent_grid(config.data.image_size, config.latents.name)
        self.settings = SampleConfig(
            recipe.sampler, recipe.steps, recipe.guidance, list(recipe.interval), recipe.count, recipe.block
        )
        self.model = trained.build(device)
        if recipe.compile:
            for block in self.model.blocks:
                block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False, options=REPRODUCIBLE)
        self.float32 = "tf32" if recipe.precision != "fp32" and device.type == "cuda" else "fp32"

    @torch.no_grad()
    def __call__(self, block: int) -> np.ndarray:
        """(n, H, W, 3) uint8.

        Raises:
            DataError: the model's numbers are not finite.
        """
        with arithmetic.within(self.float32):
            return self._draw(block)

    def _draw(self, block: int) -> np.ndarray:
        recipe = self.recipe
        index = torch.arange(block * recipe.block, (block + 1) * recipe.block, device=self.device)
        with self._precision():
            drawn = sample_numbered(
                lambda x, t, y: self.model(x, t, y)[0].float(),
                index,
                recipe.labels(index),
                recipe.num_classes,
                self.shape,
                recipe.seed,
                self.settings,
                recipe.path,
            )
        if not torch.isfinite(drawn).all():
            raise DataError(
                f"samples of block {block} are not finite: the weights have diverged; use an older checkpoint"
            )
        images = torch.cat([self.latents.decode(part, recipe.decode) for part in drawn.split(recipe.decode)])
        return images[: recipe.size_of(block)].permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _precision(self):
        bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()


def draw_missing(blocks: Blocks, draw: Callable[[int], np.ndarray], ranks: Ranks, stop: StopRequest) -> bool:
    """Draws the blocks that are not there, each by whichever thread of whichever process is free.

    Returns:
        Whether a wish to stop left some out; all ranks return together.

    On a CPU every block is computed by one thread, and several side by side: how a matrix product is cut up between
    threads changes its bits, and so would the number of cores.

    Raises:
        UserError: the first that any process met.
    """
    prefix = ranks.broadcast_object(uuid.uuid4().hex)
    todo: list[int] = ranks.broadcast_object(blocks.missing() if ranks.is_main else None)
    ended = threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            store = ranks.store()
            if ranks.device.type == "cuda":
                torch.cuda.set_device(ranks.device)
            else:
                torch.set_num_threads(1)
            while not ended.is_set():
                place = store.add(f"{prefix}/next", 1) - 1
                if place >= len(todo):
                    return
                blocks.write(todo[place], draw(todo[place]))
        except BaseException as error:
            errors.append(error)
            ended.set()

    threads = torch.get_num_threads()
    workers = threads if ranks.device.type == "cpu" else 1
    at_work = [
        threading.Thread(target=work, name="drawing", daemon=True) for _ in range(max(1, min(workers, len(todo))))
    ]
    for thread in at_work:
        thread.start()
    store = ranks.store()
    with _progress(blocks, ranks.is_main) as show:
        while any(thread.is_alive() for thread in at_work):
            if (stop.asked or errors) and not ended.is_set():
                ended.set()
            if ended.is_set():
                store.set(f"{prefix}/end", "")
            elif store.check([f"{prefix}/end"]):
                ended.set()
            show()
            at_work[0].join(LOOK_SECONDS) if at_work[0].is_alive() else time.sleep(LOOK_SECONDS / 10)
    torch.set_num_threads(threads)
    everywhere = ranks.gather_objects((_plain(errors), ended.is_set()))
    for theirs, _ in everywhere:
        if theirs:
            raise theirs[0]
    stopped = any(ended for _, ended in everywhere)
    return ranks.broadcast_object(_unfinished(blocks, stopped) if ranks.is_main else None)


def _unfinished(blocks: Blocks, stopped: bool) -> bool:
    """Whether blocks are missing; those of other machines may be seen late in a shared folder."""
    until = time.monotonic() + PATIENCE
    while missing := blocks.missing():
        if stopped:
            return True
        if time.monotonic() > until:
            raise DataError(
                f"block {missing[0]} is not in {blocks.folder}; --out must be a folder that all nodes share"
            )
        time.sleep(LOOK_SECONDS)
    return False


def _plain(errors: list[BaseException]) -> list[BaseException]:
    """What can travel to the other ranks."""
    return [e if isinstance(e, UserError) else RuntimeError(f"{type(e).__name__}: {e}") for e in errors]


@contextmanager
def _progress(blocks: Blocks, show: bool) -> Iterator[Callable[[], None]]:
    """A bar over the samples of all processes, with the time that remains; a line a minute where there is no
    terminal."""
    if not show:
        yield lambda: None
        return
    began, first = time.monotonic(), blocks.finished()
    told = looked = began
    total = blocks.recipe.count
    with progress_bar() as bar:
        task = bar.add_task("drawing", total=total, completed=first)

        def look() -> None:
            nonlocal told, looked
            now = time.monotonic()
            if now - looked < LOOK_SECONDS:
                return
            looked = now
            with suppress(OSError):
                done = blocks.finished()
                bar.update(task, completed=done)
                if bar.disable and now - told >= TELL_SECONDS and done > first:
                    told = now
                    rate = (done - first) / (now - began)
                    left = (total - done) / rate / 60
                    print(
                        f"{done} of {total} samples, {rate:.3g} a second, {left:.0f} min left",
                        file=sys.stderr,
                        flush=True,
                    )

        yield look
