"""Runs the pieces of benchmarks/gpu.sh within a time budget, and leaves every result in one folder (docs/gpu.md).

Standard library only: it has to start, and to say what is missing, on a machine where nothing else does. Each piece is
a process with a time limit; whatever becomes of it, the next one runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from benchmarks.layout import prepare
from benchmarks.pieces import ENVIRONMENT, REHEARSAL_SECONDS, Piece, pieces
from repa_scale.errors import INTERRUPTED, ConfigError, ExitCode, UserError, did_you_mean

RESERVE = 5.0  # seconds kept back for ending the last piece and cleaning up
LEAST = 10.0  # seconds: with less time left, a piece is not started
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
LOGGED = 512 << 10  # bytes per piece that log.txt keeps of its output
TAIL = 15  # lines of a failed piece's output shown on the terminal
LARGEST = 16 << 20  # bytes per file of the results


@dataclass(frozen=True)
class Ended:
    """How a piece ended. `state`: passed, failed, timed out, interrupted, not run."""

    name: str
    state: str
    code: int | None = None
    seconds: float = 0.0
    reason: str = ""

    def row(self) -> dict:
        row = {"benchmark": "gpu", "piece": self.name, "state": self.state, "exit_code": self.code}
        return row | {"seconds": round(self.seconds, 1)} | ({"reason": self.reason} if self.reason else {})

    def __str__(self) -> str:
        code = "" if self.code is None else f"exit code {self.code:3d} {self.seconds:7.1f} s"
        return f"{self.name:36s} {self.state:10s} {code}{self.reason}"


def main(argv: list[str] | None = None) -> int:
    began = time.monotonic()
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        return run(args, began + args.seconds)
    except UserError as error:
        print(f"gpu: error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except OSError as error:  # of the results' folder or the temporary one; what pieces do stays in them
        where = f" {error.filename}" if error.filename else ""
        print(
            f"gpu: error:{where} cannot be written ({error.strerror}); give another --out, or TMPDIR", file=sys.stderr
        )
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see benchmarks/gpu.sh --help")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, checked.

    Raises:
        ConfigError: they cannot work.
    """
    parser = _Parser(prog="benchmarks/gpu.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=560.0, help="time budget (default: 560)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="an empty folder for the results")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="made by benchmarks/gpu_wheels.sh")
    parser.add_argument("--public", type=Path, metavar="DIR", help="public REPA code (default: WHEELS/public)")
    parser.add_argument("--rehearse", action="store_true", help="every piece on the CPU, with tiny sizes")
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="only these: " + ", ".join(groups()))
    args = parser.parse_args(argv)
    if not RESERVE + LEAST <= args.seconds < math.inf:  # false for nan
        raise ConfigError(f"--seconds {args.seconds:g} must be a number of at least {RESERVE + LEAST:g}")
    names = {name for piece in pieces(None) for name in (piece.name, piece.group)}
    for name in args.pieces:
        if name not in names:
            raise ConfigError(f"PIECE {name} is not a piece{did_you_mean(name, names)}")
    for option in ("wheels", "public"):
        folder = getattr(args, option)
        if folder is not None and not folder.is_dir():
            raise ConfigError(f"--{option} {folder} is not a folder; make one with benchmarks/gpu_wheels.sh")
    if args.wheels is not None:
        args.wheels = args.wheels.resolve()
        if not any(args.wheels.glob("*.whl")):
            raise ConfigError(f"--wheels {args.wheels} holds no wheels; fill it with benchmarks/gpu_wheels.sh")
        if args.public is None and (args.wheels / "public").is_dir():
            args.public = args.wheels / "public"
    args.public = args.public and args.public.resolve()
    args.out = args.out.resolve()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"--out {args.out} is not an empty folder; choose a new one, so that no results are mixed")
    return args


def groups() -> list[str]:
    return list(dict.fromkeys(piece.group for piece in pieces(None)))


def run(args: argparse.Namespace, deadline: float) -> int:
    """All pieces that were asked for, until `deadline` on the monotonic clock. Returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the piece, and removes what lies in /tmp
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "log.txt").touch()
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be written ({error.strerror}); choose another folder") from None
    asked = [p for p in pieces(args.public) if not args.pieces or {p.name, p.group} & {*args.pieces, ENVIRONMENT}]
    ended: list[Ended] = []
    with (
        tempfile.TemporaryDirectory(prefix="repa_scale_gpu_", ignore_cleanup_errors=True) as work,
        (args.out / "log.txt").open("ab", buffering=0) as log,
        (args.out / "summary.jsonl").open("a") as summary,
    ):
        environment = prepare(Path(work), args.out, args.wheels, args.rehearse, log)
        for piece in asked:
            one = _one(piece, args, deadline - time.monotonic() - RESERVE, environment, Path(work), log)
            ended.append(one)
            summary.seek(0, os.SEEK_END)  # the pieces write there too
            summary.write(json.dumps(one.row()) + "\n")
            summary.flush()
            print(one, flush=True)
            if one.state in ("failed", "timed out"):
                print(_tail(args.out / "log.txt", piece.name), flush=True)
            if one.state == "interrupted":
                raise KeyboardInterrupt
            if piece.name == ENVIRONMENT and one.code == ExitCode.BAD_INPUT:
                raise UserError("this machine cannot run the pieces; see the line above")
    return _verdict(ended, args.out)


def _one(
    piece: Piece, args: argparse.Namespace, left: float, environment: dict[str, str], work: Path, log: BinaryIO
) -> Ended:
    if piece.needs_public and args.public is None:
        return Ended(piece.name, "not run", reason="no --public")
    if left < LEAST:
        return Ended(piece.name, "not run", reason="no time left")
    command = [sys.executable, *piece.command, *(piece.rehearsal if args.rehearse else ())]
    environment = {**environment, **piece.environment, **(piece.rehearsal_environment if args.rehearse else {})}
    limit = min(left, REHEARSAL_SECONDS if args.rehearse else piece.seconds)
    log.write(f"\n== {piece.name} (limit {limit:.0f} s): {' '.join(command)}\n".encode())
    began = time.monotonic()
    try:
        code = execute(command, limit, environment, work, log)
    except KeyboardInterrupt:
        return Ended(piece.name, "interrupted", INTERRUPTED, time.monotonic() - began)
    seconds = time.monotonic() - began
    if code is None:
        log.write(f"== {piece.name}: stopped after {seconds:.0f} s\n".encode())
        return Ended(piece.name, "timed out", 124, seconds)
    return Ended(piece.name, "failed" if code else "passed", code, seconds)


def execute(
    command: Sequence[object], limit: float, environment: dict[str, str], folder: Path, log: BinaryIO
) -> int | None:
    """Runs a command, output to `log`; ends it and all that it started. Returns its exit code; None: out of time."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = threading.Thread(target=_copy, args=(process.stdout, log), daemon=True)
    reader.start()
    code = None
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(limit)
    finally:
        _end(process)
        reader.join(GRACE)  # a process that left its group may hold the pipe open
    return code


def _end(process: subprocess.Popen) -> None:
    """The process group: a piece may have started others, which must not run beside the next piece."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    """The first `LOGGED` bytes; the rest is read and dropped, so that nobody waits on a full pipe."""
    written = 0
    with suppress(ValueError):  # the log was closed
        for line in source:
            if written <= LOGGED:
                with suppress(OSError):  # the disk is full: the piece must not wait for a reader
                    log.write(line if written + len(line) <= LOGGED else b"== the rest of the output was dropped\n")
            written += len(line)


def _tail(log: Path, name: str) -> str:
    """The last lines that a piece wrote."""
    lines = log.read_text(errors="replace").rpartition(f"\n== {name} (limit")[2].splitlines()[1:][-TAIL:]
    return "\n".join(f"    {line[:240]}" for line in lines)


def _verdict(ended: list[Ended], out: Path) -> int:
    """Prints what came of it all."""
    bad = [f"{one.name} ({one.state})" for one in ended if one.state in ("failed", "timed out")]
    for file in sorted(out.iterdir()):
        if (size := file.stat().st_size) > LARGEST:
            print(f"{file.name} has {size / 2**20:.0f} MiB, more than {LARGEST >> 20}; it may be too large to carry")
    counts = {state: sum(one.state == state for one in ended) for state in ("passed", "not run")}
    print(f"{counts['passed']} passed, {len(bad)} failed, {counts['not run']} not run; results in {out}")
    if bad:
        print(f"failed: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
