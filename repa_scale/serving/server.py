"""`repa-scale serve`: an exported model over HTTP, on one machine. The routes are in app.py."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repa_scale.errors import DataError, ExitCode, UserError, reason, require
from repa_scale.processes import end_process
from repa_scale.sealed import MANIFEST, read_sealed
from repa_scale.serving.asked import Defaults, Limits
from repa_scale.serving.batcher import Wish

if TYPE_CHECKING:
    from repa_scale.serving.app import Service
    from repa_scale.serving.pipeline import SiTPipeline

EXAMPLE = "repa-scale serve exports/first --port 8000"
TOKEN_VARIABLE = "REPA_SCALE_TOKEN"
DTYPES = ("fp32", "bf16", "fp16")
CHECK_STEPS = 3  # of the check that a fixed batch keeps its promise

log = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Serves until SIGTERM or SIGINT; then finishes what was accepted. A failed GPU ends it with FAILED."""
    args = _parse(argv)
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    token = _token(args.token_file)
    sockets = [_listen(args.host, args.port)]
    pipe, draw = _ready(args)
    service = _service(args, pipe, draw, token)
    import uvicorn

    from repa_scale.serving.app import create_app

    def on_lost() -> None:
        server.should_exit = True  # uvicorn looks at it ten times a second, and lets answers out first

    app = create_app(service, on_lost)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(args.timeout) + 1)
    server = uvicorn.Server(config)
    where = sockets[0].getsockname()
    print(f"serving {args.model} at http://{where[0]}:{where[1]}", flush=True)
    # uvicorn raises the signal that stopped it once more at its end: by default that would kill a finished server.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server.run(sockets=sockets)
    if not app.state.batcher.lost:
        return ExitCode.COMPLETED
    print("repa-scale: error: the GPU has failed; the log above says how. Start the server again", file=sys.stderr)
    end_process(ExitCode.FAILED)  # without CUDA's destructors, which abort on a broken context


def _ready(args: argparse.Namespace) -> tuple[SiTPipeline, Drawing]:
    """The pipeline on its device, and its drawing after the first image.

    Raises:
        UserError: the device cannot hold it, or does not work.
    """
    from repa_scale import arithmetic
    from repa_scale.serving.faults import at_start

    arithmetic.use("fp32")  # what --dtype fp32 says, on a GPU too
    try:
        pipe = open_pipeline(args.model, args.device, args.dtype)
        if args.compile:
            pipe.transformer.compile()
        draw = Drawing(pipe, args.max_batch if args.fixed_batch or args.compile else 0)
        draw.warm()
    except Exception as error:
        if line := at_start(error):
            raise UserError(f"--device {args.device}: {line}") from None
        raise
    return pipe, draw


class Drawing:
    """A pipeline as what the batcher calls.

    Args:
        fixed: images that the model is always evaluated with; 0: as many as there are.
    """

    def __init__(self, pipe: SiTPipeline, fixed: int = 0) -> None:
        from repa_scale.devices import use

        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.fixed, self._use = pipe, fixed, use
        use(pipe.device)

    def __call__(self, wishes: Sequence[Wish], wanted: Callable[[], bool] = lambda: True) -> np.ndarray:
        """Wishes of one kind -> (N, H, W, 3) uint8."""

        def look(pipe: SiTPipeline, i: int, t: float, state: dict) -> dict:
            pipe.interrupt = not wanted()
            return {}

        self._use(self.pipe.device)  # the batcher's thread begins on GPU 0
        return self.pipe(
            [wish.label for wish in wishes],
            seed=[wish.seed for wish in wishes],
            guidance=[wish.guidance for wish in wishes],
            interval=[wish.interval for wish in wishes],
            steps=wishes[0].steps,
            sampler=wishes[0].sampler,
            output_type="uint8",
            callback_on_step_end=look,
            fixed_batch=self.fixed,
        ).images

    def warm(self) -> None:
        """Draws once, so that the first client does not wait for it; and checks a fixed batch's promise.

        Raises:
            UserError: equal images in different places of the batch have different bits on this machine.
        """
        guided = Wish(0, 0, CHECK_STEPS, "euler", 2.0, (0.0, 1.0))
        if not self.fixed:
            self([guided])
            return
        for sampler in ("euler", "sde"):
            latents = self.pipe(
                [0] * self.fixed,
                seed=[0] * self.fixed,
                guidance=2.0,
                steps=CHECK_STEPS,
                sampler=sampler,
                output_type="latent",
                fixed_batch=self.fixed,
            ).images
            if not bool((latents == latents[:1]).all()):
                raise UserError(
                    f"--fixed-batch: on this machine the place in a batch of {self.fixed} changes an image's bits; "
                    "choose another --max-batch (1 always holds), or leave the option out"
                )


def open_pipeline(folder: str | Path, device: str = "auto", dtype: str = "fp32") -> SiTPipeline:
    """The pipeline of an export in diffusers' layout, of another export, a run or a checkpoint.

    Raises:
        DataError: nothing of the kind lies there, or it is damaged.
        UserError: the device is not there.
    """
    import torch

    from repa_scale.serving import SiTPipeline
    from repa_scale.serving.build import pipeline_of

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device} is no device ({reason(error)}); give cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and not (chosen.index or 0) < torch.cuda.device_count():
        raise UserError(f"--device {device}: torch finds no such GPU on this machine; leave the option out")
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return pipeline_of(folder).to(device, kind)
    if (folder / MANIFEST).is_file():  # diffusers' own save_pretrained writes none
        read_sealed(folder)
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()  # what is wrong is told in one line
    diffusers_logging.set_verbosity(logging.CRITICAL)
    try:
        pipe = SiTPipeline.from_pretrained(str(folder), torch_dtype=kind, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds
        raise DataError(f"{folder} cannot be loaded: {reason(error)}; export the run again") from None
    return pipe.to(device)


def _service(args: argparse.Namespace, pipe: SiTPipeline, draw: Drawing, token: str) -> Service:
    from repa_scale.serving.app import Service

    settings = pipe.scheduler.config
    defaults = Defaults(
        min(settings.num_inference_steps, args.max_steps), settings.guidance, tuple(settings.interval), settings.sampler
    )
    described = {
        "name": Path(args.model).resolve().name,
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "image_size": pipe.latent_shape[1] * pipe.latent_spec.factor,
        "batch": args.max_batch,
        "token": bool(token),
    }
    return Service(
        draw,
        pipe.labels,
        defaults,
        Limits(min(args.max_n, args.queue), args.max_steps),
        described,
        max_batch=args.max_batch,
        max_queue=args.queue,
        linger=args.linger / 1000,
        timeout=args.timeout,
        token=token,
    )


def _token(file: str | None) -> str:
    """The token that clients must show: of the file, else of the environment.

    Raises:
        UserError: the file cannot be read, or holds nothing.
    """
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    try:
        token = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file} cannot be read ({error}); give a file that holds the token") from None
    if not token:
        raise UserError(f"--token-file {file} is empty; write the token into it, or leave the option out")
    return token


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}; choose another port (0: any free one)") from None


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="repa-scale serve", description=__doc__, epilog=f"example: {EXAMPLE}")
    parser.add_argument("model", help="an export (--to diffusers or safetensors), a run folder or a checkpoint")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: 8000)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="default: fp32")
    parser.add_argument("--max-batch", type=_positive, default=8, help="images drawn at a time (default: 8)")
    parser.add_argument("--fixed-batch", action="store_true", help="always draw --max-batch: bit-equal images")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model; implies --fixed-batch")
    parser.add_argument("--queue", type=_positive, default=64, help="images that may wait (default: 64)")
    parser.add_argument("--linger", type=_seconds, default=5.0, help="ms to wait for a fuller batch (default: 5)")
    parser.add_argument("--timeout", type=_seconds, default=300.0, help="seconds for a request (default: 300)")
    parser.add_argument("--max-n", type=_positive, default=16, help="images a request (default: 16)")
    parser.add_argument("--max-steps", type=_positive, default=1000, help="sampler steps (default: 1000)")
    parser.add_argument("--token-file", help=f"file with the token that clients must show (default: ${TOKEN_VARIABLE})")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be from 0 to a million")
    return value
