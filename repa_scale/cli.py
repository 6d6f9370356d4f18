"""`repa-scale VERB`: the table of verbs. A verb's module is imported when it is called, and has `main(argv) -> int`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple

from repa_scale.errors import INTERRUPTED, ExitCode, UserError, did_you_mean

RANK_FLAGS = ("--local_rank=", "--local-rank=")


class Verb(NamedTuple):
    """Where a verb lives, and its line in the help."""

    module: str
    help: str


VERBS = {
    "prepare": Verb("repa_scale.prepare", "images (a folder, zip or tar of class folders) -> a data set of shards"),
    "train": Verb("repa_scale.train", "train a run: one process, or many under deepspeed, torchrun, Slurm, Kubernetes"),
    "launch": Verb("repa_scale.launch", "train on many nodes through deepspeed, with its faults mended"),
    "supervise": Verb("repa_scale.supervise", "start a training command again until its run is done"),
    "checkpoints": Verb("repa_scale.checkpoints", "list, verify and prune a run's checkpoints"),
    "sample": Verb("repa_scale.sample", "a checkpoint or an export -> images"),
    "evaluate": Verb("repa_scale.evaluate", "samples -> FID and the like; a checkpoint -> what its tokens hold"),
    "compare": Verb("repa_scale.compare", "MLflow runs -> the report of REPA against its baseline"),
    "doctor": Verb("repa_scale.doctor", "what this machine or cluster can run, and what stands in the way"),
    "plan": Verb(
        "repa_scale.plan", "model, GPUs, batch -> memory, step time, days and cost, before a cluster is booked"
    ),
    "export": Verb(
        "repa_scale.export", "a checkpoint -> safetensors, diffusers, torch.export, ONNX, MLflow, the public layout"
    ),
    "import": Verb("repa_scale.import_weights", "a public REPA or SiT checkpoint -> initial weights"),
    "serve": Verb("repa_scale.serving.server", "an exported model over HTTP: class, seed, steps, guidance -> PNG"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns its exit code. What the user can mend is one line on stderr and code 64."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return int(_dispatch(argv))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"repa-scale: error: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    except KeyboardInterrupt:
        print("repa-scale: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0].startswith(
        RANK_FLAGS
    ):  # `deepspeed --module repa_scale VERB` adds it; LOCAL_RANK says the same
        argv = argv[1:]
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(help_text())
        return ExitCode.COMPLETED if argv else ExitCode.BAD_INPUT
    if argv[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"repa-scale {version('repa-scale')}")
        return ExitCode.COMPLETED
    if argv[0] not in VERBS:
        raise UserError(f"{argv[0]!r} is not a verb{did_you_mean(argv[0], VERBS)}")
    module = importlib.import_module(VERBS[argv[0]].module)
    try:
        return module.main(argv[1:]) or ExitCode.COMPLETED
    except SystemExit as leaving:  # argparse: 2 for a wrong argument, 0 after --help
        return ExitCode.BAD_INPUT if leaving.code == 2 else int(leaving.code or 0)


def help_text() -> str:
    """The help of the program."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: repa-scale VERB [...]",
            "",
            "Trains REPA diffusion transformers, and their baselines, on one machine or many.",
            "",
            *lines,
            "",
            "repa-scale VERB --help shows a verb's arguments and an example; `python -m repa_scale` is the same.",
            "exit codes: 0 completed, 64 wrong input, 65 diverged, 70 failed, 75 saved (start again to go on)",
        ]
    )
