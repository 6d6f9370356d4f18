"""What one call of each kernel costs the host, at 8,192 rows: the device needs about 25 us for a cosine of that size.

    python -m benchmarks.kernel_host

`launched` (on a GPU) includes Triton's launcher, `stubbed` is all but the launches. The calls take turns; each figure
is the least of all rounds. `empty function` is the floor: what torch takes for an autograd function that does nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from repa_scale.kernels import cosine_loss, normalize_tokens, projector_cosine_loss, unavailable
from repa_scale.kernels.choice import INSTALLED
from torch import Tensor, nn

from benchmarks.command import Parser, answered, positive, put_row
from repa_scale.errors import ConfigError

IMAGES, TOKENS, WIDTH = 32, 256, 768
HEAD = (1152, 2048)  # width of SiT-XL and of its projector
GOAL = 40e-6  # seconds of the cosine, forward and backward, stubbed
CALLS = 20  # between two waits: few enough that CUDA's queue of launches never fills


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=positive, default=200)
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available() and not args.rehearse
    return answered(lambda: measure(torch.device("cuda" if cuda else "cpu"), 3 if args.rehearse else args.rounds, args))


def measure(device: torch.device, rounds: int, args) -> int:
    if not INSTALLED:
        raise ConfigError("triton is not installed, and its kernels are what is launched; install it")
    for way in ("launched", "stubbed") if device.type == "cuda" else ("stubbed",):
        if way == "launched" and (problem := unavailable(device)):
            print(f"launched: not measured: {problem}")
            continue
        with ExitStack() as stack:
            if way == "stubbed":
                for name, answer in (("table.start", None), ("choice.unavailable", "")):
                    stub = mock.patch(f"repa_scale.kernels.{name}", lambda *_, answer=answer: answer)
                    stack.enter_context(stub)
            seconds = host_seconds(calls(device), device, rounds)
        for name, value in seconds.items():
            print(f"{way:9s} {name:30s} {1e6 * value:7.1f} us")
        row = {"case": way, "rows": IMAGES * TOKENS, "width": WIDTH, "seconds": seconds, "goal_seconds": GOAL}
        put_row("kernel_host", row, args.rehearse)
    return 0


def host_seconds(calls: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds per call until the host is done with it: the least of `rounds`, in which the calls take turns."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(1 + rounds):  # in the first the kernels are compiled
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            least[name] = min(least[name], (time.perf_counter() - began) / CALLS)
    return least


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.new_empty(())

    @staticmethod
    def backward(ctx, upstream):
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def calls(device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name. The projector needs a GPU: on a CPU its matrix products would be in the figure."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, y, with_class = normal(IMAGES, TOKENS, WIDTH), normal(IMAGES, TOKENS, WIDTH), normal(IMAGES, 1 + TOKENS, WIDTH)
    x.requires_grad_()
    ones = torch.ones(IMAGES, device=device)

    def with_backward(loss: Callable[[], Tensor], upstream: Tensor | None, *leaves: Tensor) -> Callable[[], None]:
        def call() -> None:
            loss().backward(upstream)
            for leaf in leaves:
                leaf.grad = None

        return call

    def mean() -> Tensor:
        return cosine_loss(x, y, kernel="triton")

    def by_image() -> Tensor:
        return cosine_loss(x, y, reduction="image", kernel="triton")

    found = {
        "empty function, with backward": with_backward(lambda: Empty.apply(x), None, x),
        "cosine": mean,
        "cosine, with backward": with_backward(mean, None, x),
        "cosine by image": by_image,
        "cosine by image, with backward": with_backward(by_image, ones, x),
    }
    for kind in ("layernorm", "spatial"):
        found[kind] = lambda kind=kind: normalize_tokens(with_class, kind, 1, kernel="triton")
    if device.type == "cuda":
        sizes = ((HEAD[0], HEAD[1]), (HEAD[1], HEAD[1]), (HEAD[1], WIDTH))
        first, second, third = (nn.Linear(*size, device=device, dtype=torch.bfloat16) for size in sizes)
        projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), third)
        hidden = normal(IMAGES, TOKENS, HEAD[0]).requires_grad_()
        found["projector, with backward"] = with_backward(
            lambda: projector_cosine_loss(hidden, projector, y, kernel="triton"),
            None, hidden, *projector.parameters(),
        )  # fmt: skip
    return found


if __name__ == "__main__":
    sys.exit(main())
