"""`repa-scale doctor`: what each node can run, and what stands in the way, in one table, each finding with its remedy.

One check is one function in table.py, run on every node at once (node.py); across.py compares the nodes, and
network.py measures what lies between them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import uuid
from pathlib import Path

from repa_scale.errors import ConfigError, ExitCode

EXAMPLE = "repa-scale doctor --hostfile hosts experiment=repa_sit_xl data.path=data/imagenet256 run.dir=runs/xl"


def main(argv: list[str]) -> int:
    """Code 0: nothing is in the way of a run; 70: something is; 64: the arguments are wrong."""
    args, words = parser().parse_known_args(argv)
    from repa_scale.doctor.finding import FAIL
    from repa_scale.doctor.page import page

    findings, nodes = examine(args, words)
    if args.json:
        print(json.dumps({"nodes": nodes, "findings": [dataclasses.asdict(each) for each in findings]}, indent=2))
    else:
        print(page(findings, nodes))
    return ExitCode.FAILED if any(each.state == FAIL for each in findings) else ExitCode.COMPLETED


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repa-scale doctor",
        description="What each node can run, and what stands in the way. The options are deepspeed's.",
        epilog=f"What follows the options are the run's keys, as for `repa-scale train`. example: {EXAMPLE}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-H", "--hostfile", type=Path, help="lines `NODE slots=N`; without it this machine alone")
    add("-i", "--include", default="", metavar="NODE[:SLOT,...][@...]", help="only these nodes and slots")
    add("-e", "--exclude", default="", metavar="NODE[:SLOT,...][@...]", help="all but these")
    add("--master_addr", default="", metavar="ADDRESS", help="of the first node, for the others (found out)")
    add("--master_port", type=int, default=0, metavar="PORT", help="on the first node, to be looked at (any)")
    add("--fetch", action="store_true", help="bring the run's encoder and VAE weights to every node, once each")
    add("--no-network", action="store_true", help="leave out the all-reduce between the nodes")
    add("--patience", type=float, default=120.0, metavar="S", help="seconds for a node's checks (120)")
    add("--json", action="store_true", help="the findings as JSON, for programs")
    return parser


def examine(args: argparse.Namespace, words: list[str]) -> tuple[list, list[str]]:
    """All findings, and the names of the nodes.

    Raises:
        ConfigError: the host file, an option or a key is wrong.
    """
    from repa_scale.doctor.across import between
    from repa_scale.doctor.nodes import Answer, ask_all
    from repa_scale.doctor.software import facts
    from repa_scale.launch.hostfile import choose, read_hostfile

    hosts, slots = [""], [None]
    if args.hostfile:
        chosen = choose(read_hostfile(args.hostfile), args.include, args.exclude, None, None)
        hosts, slots = [host.name for host in chosen], [len(host.slots) for host in chosen]
    elif args.include or args.exclude:
        raise ConfigError("--include and --exclude choose from a host file; give --hostfile FILE")
    look = make_look(args, words, len(hosts), sum(slots) if args.hostfile else 0)
    marker = leave_marker(look) if args.hostfile and len(hosts) > 1 and not args.fetch else None
    looks = [
        dataclasses.replace(look, first=number == 0, slots=count, marker=str(marker or ""))
        for number, count in enumerate(slots)
    ]
    try:
        answers = ask_all(hosts, looks, 3600.0 if args.fetch else args.patience)
    finally:
        if marker:
            marker.unlink(missing_ok=True)
    nodes = [answer.node for answer in answers]
    findings = [each for answer in answers for each in answer.findings]
    if not args.fetch and args.hostfile:
        findings += between(answers, Answer("", facts=facts(look)))
    if not args.fetch and not args.no_network:
        findings += _network(args, hosts, answers)
    return findings, nodes


def make_look(args: argparse.Namespace, words: list[str], nodes: int, ranks: int):
    """What the nodes are to look at. Without keys of a run: what every run needs.

    Raises:
        ConfigError: a key is wrong.
    """
    from repa_scale.compose import compose
    from repa_scale.doctor.finding import Look
    from repa_scale.launch.environment import forwarded

    look = Look(run_dir=os.getcwd(), nodes=nodes, port=args.master_port, fetch=args.fetch)
    look.variables = forwarded(os.environ)
    unknown = [word for word in words if word.startswith("--") and not word.startswith("--config")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not an option of repa-scale doctor; see repa-scale doctor --help")
    if not words:
        if args.fetch:
            raise ConfigError(f"--fetch needs the run whose weights are meant; for example: {EXAMPLE} --fetch")
        return look
    from repa_scale.objective import count_parameters
    from repa_scale.validation import validate

    config = compose(words)
    given, config.data.path = config.data.path, config.data.path or ("" if config.data.remote else "to come")
    validate(config, ranks or 1)
    config.data.path = given
    for room, key in (("data", "path"), ("data", "cache"), ("run", "dir"), ("deepspeed", "config")):
        if value := getattr(getattr(config, room), key):
            setattr(getattr(config, room), key, os.path.abspath(value))
    if (uri := config.tracking.uri).startswith("sqlite:///"):
        config.tracking.uri = f"sqlite:///{os.path.abspath(uri.removeprefix('sqlite:///'))}"
    look.config = dataclasses.asdict(config)
    look.run_dir, look.deepspeed_file = config.run.dir, config.deepspeed.config
    look.config_file = _config_file(words)
    look.checkpoint_bytes = 16 * count_parameters(config)
    saves = math.ceil(config.train.steps / config.train.checkpoint_every)
    look.kept_bytes = look.checkpoint_bytes * min(
        saves, config.checkpoint.keep_last + 1 if config.checkpoint.keep_last else saves
    )
    return look


def _config_file(words: list[str]) -> str:
    for number, word in enumerate(words):
        if word == "--config" and number + 1 < len(words):
            return os.path.abspath(words[number + 1])
        if word.startswith("--config="):
            return os.path.abspath(word.partition("=")[2])
    return ""


def leave_marker(look) -> Path | None:
    """A file that nodes with the same folder see; None where this machine may not write there."""
    from repa_scale.doctor.machine import existing

    file = existing(Path(look.run_dir)) / f".repa-scale-doctor-{uuid.uuid4().hex}"
    try:
        file.touch()
    except OSError:
        return None
    return file


def _network(args: argparse.Namespace, hosts: list[str], answers: list) -> list:
    """The all-reduce over the nodes that answered."""
    from repa_scale.doctor.network import network

    heard = [number for number, answer in enumerate(answers) if answer.facts]
    if not heard:
        return []
    gpus = min(answers[number].facts["gpus"] for number in heard)
    if len(heard) == 1 and gpus < 2:
        return []  # there is nobody to talk to
    names = [answers[number].node for number in heard]
    address = args.master_addr or answers[heard[0]].address
    backend, per_node = ("nccl", gpus) if gpus else ("gloo", 1)
    return network([hosts[number] for number in heard], names, address, per_node, backend)
