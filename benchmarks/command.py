"""How a benchmark is called: bad arguments are answered in one line with exit code 64, as by `repa-scale`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.rows import device_name, write_row
from repa_scale.errors import ExitCode, UserError

OUT_OF_MEMORY = 1  # exit code


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line and code 64, with the option `--rehearse` if it has a rehearsal."""

    def __init__(self, doc: str, rehearsal: bool = True) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        if rehearsal:
            self.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, seconds long")

    def parse_args(self, *args: Any, **kwargs: Any) -> argparse.Namespace:
        found = super().parse_args(*args, **kwargs)
        if getattr(
            found, "rehearse", False
        ):  # before torch looks for a GPU: DeepSpeed would choose it whatever the run's device
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return found

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(ExitCode.BAD_INPUT)


def positive(text: str) -> int:
    """A whole number of at least 1, for `type=` of an argument."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def answered(work: Callable[[], int]) -> int:
    """The exit code of `work`; a mistake of the user's is one line on stderr and code 64."""
    try:
        return work()
    except UserError as error:
        print(f"benchmark: error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT


def shortage(error: BaseException) -> str | None:
    """One line if memory did not suffice; None: it is another error."""
    text = (str(error).splitlines() or [""])[0]
    signs = ("out of memory", "allocate memory", "ALLOC_FAILED")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in text for sign in signs):
        return f"memory does not suffice ({text or type(error).__name__}); use a smaller --batch"
    return None


def put_row(name: str, row: dict[str, Any], rehearsal: bool) -> Path | None:
    """Appends a row to NAME.jsonl. A rehearsal without BENCHMARK_OUT prints it instead: its figures are no results."""
    if rehearsal:
        row = {**row, "rehearsal": True}
        if not os.environ.get("BENCHMARK_OUT"):
            print(json.dumps({"benchmark": name, "device": device_name(), **row}))
            return None
    return write_row(name, row)
