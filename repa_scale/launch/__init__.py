"""`repa-scale launch [OPTIONS] KEY=VALUE ...`: a run on many nodes, through `deepspeed`, with its known faults mended.

The configuration is composed and checked here once and brought to every node over ssh, with the environment; what the
nodes are started with holds neither. A guard on each node (guard.py) passes signals to all ranks at once, tells how
they end, and leaves nothing behind. `docs/clusters.md` says what is mended, and why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from repa_scale.errors import OUTCOME_VARIABLE, ConfigError, ExitCode, UserError, did_you_mean

EXAMPLE = "repa-scale launch --hostfile hosts experiment=repa_sit_xl data.path=data/imagenet256 run.dir=runs/xl"
HOSTFILE = Path("/job/hostfile")  # deepspeed's default
PORT = 29500  # deepspeed's and torch's, where each node is started on its own and all must know it


def main(argv: list[str]) -> int:
    """Returns the run's own exit code."""
    parser = _parser()
    args, words = parser.parse_known_args(argv)
    from repa_scale.compose import OPTIONS, print_requested

    for word in words:
        option = word.partition("=")[0]
        if option.startswith("-") and option not in OPTIONS:
            known = [*parser._option_string_actions, *OPTIONS]
            raise ConfigError(f"{option} is not an option of repa-scale launch{did_you_mean(option, known)}")

    if print_requested(words):
        return ExitCode.COMPLETED
    plan = make_plan(args, words)
    if args.dry_run:
        print(describe(plan))
        return ExitCode.COMPLETED
    _check_programs(plan)
    from repa_scale.launch.channel import NodeError
    from repa_scale.launch.job import Job, say

    job = Job(plan)
    try:
        code = int(job.run())
    except UserError as error:
        _leave_outcome(ExitCode.BAD_INPUT, str(error))
        raise
    except NodeError as error:
        _leave_outcome(ExitCode.FAILED, str(error))
        say(str(error))
        return ExitCode.FAILED
    _leave_outcome(code, job.error or job.problem, job.left)
    if code in (ExitCode.DIVERGED, ExitCode.FAILED):
        say(f"code {code}: {job.problem}; the logs of the ranks are in {plan.run_dir / 'log'}")
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="repa-scale launch",
        description="Starts a run on many nodes (or on this one), through deepspeed. The options are deepspeed's.",
        epilog=f"What follows the options are the run's keys, as for `repa-scale train`. example: {EXAMPLE}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-H", "--hostfile", type=Path, help=f"lines `NODE slots=N` ({HOSTFILE} if it exists, else this machine)")
    add("-i", "--include", default="", metavar="NODE[:SLOT,...][@...]", help="only these nodes and slots")
    add("-e", "--exclude", default="", metavar="NODE[:SLOT,...][@...]", help="all but these")
    add("--num_nodes", type=int, metavar="N", help="the first N nodes of the host file")
    add(
        "--num_gpus",
        type=int,
        metavar="N",
        help="the first N slots of each node; without a host file N on this machine",
    )
    add("--master_addr", default="", metavar="ADDRESS", help="of the first node, for the ranks (found out)")
    add("--master_port", type=int, default=0, metavar="PORT", help="on the first node (a free one)")
    add("--no_ssh", action="store_true", help="start this node alone; each node runs the same command, with its rank")
    add("--node_rank", type=int, default=-1, metavar="K", help="with --no_ssh: which node this is, from 0")
    add("--lost_after", type=float, default=60.0, metavar="S", help="end when a node is silent for S seconds (60)")
    add("--dry-run", action="store_true", help="print what would happen on which node, and start nothing")
    return parser


def make_plan(args: argparse.Namespace, words: list[str]):
    """Checks everything that can be checked here, and composes the configuration (repa_scale.launch.job.Plan).

    Raises:
        ConfigError: an option, the host file, `.deepspeed_env` or the configuration is wrong.
    """
    from repa_scale.compose import compose_with_origin, resolved_yaml
    from repa_scale.launch import environment
    from repa_scale.launch.job import Plan
    from repa_scale.launch.visible import VARIABLE, gpus_of
    from repa_scale.run_folder import stored_identity
    from repa_scale.stored_values import with_stored_values
    from repa_scale.validation import validate

    hosts, by_file = _hosts(args)
    if args.no_ssh:
        if not 0 <= args.node_rank < len(hosts):
            raise ConfigError(f"--no_ssh needs --node_rank 0 to {len(hosts) - 1}; got {args.node_rank}")
        if len(hosts) > 1 and not args.master_addr:
            raise ConfigError("--no_ssh needs --master_addr: the first node's name or address, the same on all nodes")
    elif args.node_rank >= 0:
        raise ConfigError("--node_rank goes with --no_ssh; over ssh the host file's order says it")
    if args.lost_after < 5:
        raise ConfigError(f"--lost_after {args.lost_after:g} is too short; give at least 5 seconds")
    config, origin = compose_with_origin(words)
    stored = stored_identity(Path.cwd() / config.run.dir)
    resumed = with_stored_values(config, stored["keys"], origin)[0] if stored else config
    validate(resumed, sum(len(host.slots) for host in hosts))
    ssh = by_file and not args.no_ssh
    variables = environment.forwarded(os.environ) if ssh else environment.inherited(os.environ)
    shown = None if ssh else os.environ.get(VARIABLE)
    for path in environment.deepspeed_env_files():
        variables |= environment.read_deepspeed_env(path)
    shown = variables.pop(VARIABLE, shown)
    for host in hosts if ssh else [hosts[max(args.node_rank, 0)]]:
        gpus_of(host.slots, shown)
    return Plan(
        hosts=hosts,
        ssh=ssh,
        no_ssh=args.no_ssh,
        node_rank=max(args.node_rank, 0),
        master=(args.master_addr, args.master_port or (PORT if args.no_ssh else 0)),
        config=resolved_yaml(config, origin),
        run_dir=Path.cwd() / config.run.dir,
        cwd=Path.cwd(),
        words=words,
        variables=variables,
        visible=shown,
        grace_seconds=config.health.grace_seconds,
        lost_after=args.lost_after,
    )


def _hosts(args: argparse.Namespace) -> tuple[list, bool]:
    """The nodes, and whether a host file names them."""
    from repa_scale.launch.hostfile import Host, choose, read_hostfile
    from repa_scale.launch.visible import VARIABLE, visible

    file = args.hostfile or (HOSTFILE if HOSTFILE.is_file() else None)
    if file is not None:
        return choose(read_hostfile(file), args.include, args.exclude, args.num_nodes, args.num_gpus), True
    if args.include or args.exclude:
        raise ConfigError("--include and --exclude choose from a host file; give --hostfile")
    if args.num_gpus is not None and args.num_gpus < 1:
        raise ConfigError(f"--num_gpus {args.num_gpus}: give at least 1")
    if args.no_ssh:
        if not args.num_nodes or not args.num_gpus:
            raise ConfigError("--no_ssh needs a host file, or --num_nodes and --num_gpus (on each node)")
        return [Host(f"node-{k}", tuple(range(args.num_gpus))) for k in range(args.num_nodes)], False
    if (args.num_nodes or 1) != 1:
        raise ConfigError(f"--num_nodes {args.num_nodes}: without a host file there is this machine alone")
    shown = visible(os.environ.get(VARIABLE))
    return [Host("localhost", tuple(range(args.num_gpus or (len(shown) if shown else _count_gpus()))))], False


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() or 1


def _check_programs(plan) -> None:
    """deepspeed, pdsh and ssh are there, at a place that deepspeed's own command lines survive."""
    from repa_scale.errors import require
    from repa_scale.launch.job import SAFE

    if not Path(sys.executable).with_name("deepspeed").exists():
        require("deepspeed", "train")
        raise UserError(f"there is no program deepspeed beside {sys.executable}; install it into the same environment")
    for program in ("ssh", "pdsh") if plan.ssh else ():
        if shutil.which(program) is None:
            raise UserError(f"{program} is not installed, and a host file needs it; install it, or use --no_ssh")
    if plan.ssh and not SAFE.fullmatch(sys.executable):
        raise UserError(
            f"Python lies in {sys.executable}, and deepspeed cannot start what has blanks or quotes in its path; "
            "install into another folder"
        )


def describe(plan) -> str:
    """What would happen on which node. Values of variables are not shown."""
    from repa_scale.launch.job import deepspeed_words
    from repa_scale.launch.visible import gpus_of, visible

    address, port = plan.master
    lines = [f"run folder   {plan.run_dir}", f"started in   {plan.cwd}"]
    lines.append(f"variables    {', '.join(sorted(plan.variables)) or 'none'} (inside ssh, in a file of mode 0600)")
    lines.append(f"config       {len(plan.config.splitlines())} lines, composed here, brought to each node")
    master = f"{address or plan.hosts[0].name}:{port or 'a free port'}"
    for node in plan.nodes():
        host, ranks = plan.hosts[node], plan.ranks_of(node)
        gpus = gpus_of(host.slots, plan.visible)
        shown = "" if gpus is None else f" (GPUs {gpus})" if visible(gpus) else " (no GPU)"
        lines.append(
            f"node {node}       {host.name}: ranks {', '.join(map(str, ranks))} on slots "
            f"{','.join(map(str, host.slots))}{shown}; rendezvous at {master}; {sys.executable}"
        )
    words = deepspeed_words(plan, "HOSTS", address or "ADDRESS", port or "PORT", "JOB")
    lines.append(f"starts       {' '.join(words)}")
    return "\n".join(lines)


def _leave_outcome(code: int, error: str, left: Sequence[str] = ()) -> None:
    """Tells `repa-scale supervise` why, and which processes could not be ended, where it started this."""
    if folder := os.environ.get(OUTCOME_VARIABLE):
        outcome = {"code": int(code), "error": error, "left": list(left)}
        with suppress(OSError):
            Path(folder, "rank_0.json").write_text(json.dumps(outcome))
