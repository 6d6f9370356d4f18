"""`repa-scale checkpoints RUN`: lists a run's checkpoints, verifies, deletes, uploads or restores them."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from repa_scale.checkpoint import QUARANTINE, REASON, CheckpointReader, list_checkpoints, list_folders
from repa_scale.config import CheckpointConfig
from repa_scale.errors import DataError, ExitCode, UserError

EXAMPLE = "repa-scale checkpoints runs/first --verify"


@dataclass(frozen=True)
class Line:
    """One checkpoint of the list."""

    name: str
    bytes: int
    world_size: str
    problem: str  # empty: none was found
    aside: bool  # in quarantine, where `problem` is why


def main(argv: list[str]) -> int:
    """Returns 64 where a checkpoint that counts is broken."""
    parser = argparse.ArgumentParser(
        prog="repa-scale checkpoints", description=__doc__.split(": ", 1)[1], epilog=f"example: {EXAMPLE}"
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument("--prune", action="store_true", help="verify, then delete all but those that --keep names")
    parser.add_argument("--keep-last", type=int, default=3, metavar="N", help="with --prune: the newest N stay (3)")
    parser.add_argument("--keep-every", type=int, default=0, metavar="N", help="and those at multiples of N steps")
    parser.add_argument("--upload", default="", metavar="URL", help="copy the newest to s3://bucket/folder, say")
    parser.add_argument("--restore", default="", metavar="URL", help="fetch the newest from there, where RUN has none")
    parser.add_argument("--best", default="", metavar="METRIC", help="and the one with the least METRIC, such as loss")
    args = parser.parse_args(argv)
    if args.keep_last < 1 or args.keep_every < 0:
        raise UserError(
            f"--keep-last={args.keep_last} must be 1 or more and --keep-every 0 or more; nothing was deleted"
        )
    folder = args.run / "checkpoints"
    if args.restore:
        _restore(args.run, args.restore)
    if not folder.is_dir():
        raise UserError(
            f"{args.run} has no checkpoints/ and so is not a run folder; give the run.dir of a training run"
        )
    lines = look(folder, contents=args.verify or args.prune)
    show(lines, verified=args.verify or args.prune)
    if args.prune:
        _prune(args, folder, lines)
    if args.upload:
        _upload(args.run, args.upload)
    broken = [line for line in lines if line.problem and not line.aside]
    return ExitCode.BAD_INPUT if broken else ExitCode.COMPLETED


def look(folder: Path, contents: bool) -> list[Line]:
    """All checkpoints of `RUN/checkpoints`, oldest first, then those set aside.

    Args:
        contents: compare the checksums of all files; False: their presence and sizes.
    """
    lines = [_line(path, contents) for path in list_folders(folder)]
    for path in sorted((folder / QUARANTINE).glob("step_*")):
        try:
            why = json.loads((path / REASON).read_text())["reason"]
        except (OSError, ValueError, KeyError, TypeError):
            why = "the reason was not written"
        lines.append(Line(path.name, _size(path), "?", why, aside=True))
    return lines


def show(lines: list[Line], verified: bool) -> None:
    """Prints the table."""
    print(f"{'checkpoint':<20} {'size':>10}  {'ranks':>5}  state")
    for line in lines:
        state = f"set aside: {line.problem}" if line.aside else f"BROKEN: {line.problem}"
        if not line.problem:
            state = "verified" if verified else "complete (sizes agree; --verify compares the contents)"
        print(f"{line.name:<20} {line.bytes / 1e6:>7.1f} MB  {line.world_size:>5}  {state}")
    if not lines:
        print("none")


def _line(path: Path, contents: bool) -> Line:
    try:
        reader = CheckpointReader(path)
    except DataError as error:
        return Line(path.name, _size(path), "?", str(error), aside=False)
    problems = reader.problems(contents)
    return Line(path.name, _size(path), str(reader.manifest.get("world_size", "?")), "; ".join(problems), aside=False)


def _upload(run: Path, url: str) -> None:
    from repa_scale.checkpoint_store import open_store, upload_newest

    with open_store(run, url, "--upload") as store:
        name = upload_newest(run, store)
    print(f"{url} has {name}, read back and verified" if name else "there is no checkpoint to upload")


def _restore(run: Path, url: str) -> None:
    from repa_scale.checkpoint_store import open_store, restore_newest

    if (run / "checkpoints").exists() and list_checkpoints(run / "checkpoints"):
        raise UserError(f"{run} has checkpoints, so nothing is fetched into it; name another folder")
    with open_store(run, url, "--restore") as store:
        name = restore_newest(run, store)
    print(f"fetched {name} from {url}" if name else f"{url} has no checkpoint")


def _prune(args: argparse.Namespace, folder: Path, lines: list[Line]) -> None:
    from repa_scale.lease import live_holder
    from repa_scale.retention import prune

    if holder := live_holder(args.run):
        raise UserError(
            f"process {holder['pid']} on {holder['host']} writes in {args.run}; prune when the run has ended, or train "
            "with checkpoint.keep_last"
        )
    policy = CheckpointConfig(keep_last=args.keep_last, keep_every=args.keep_every, best=args.best)
    good = {line.name for line in lines if not line.problem}
    gone = prune(folder, policy, good, only=good)
    print(f"deleted {len(gone)}: {', '.join(gone) or 'none'}")


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
