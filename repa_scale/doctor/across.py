"""Checks between the nodes: the same code, versions and settings, clocks that agree, the same data."""

from __future__ import annotations

from repa_scale.doctor.finding import FAIL, OK, WARN, Finding
from repa_scale.doctor.nodes import Answer
from repa_scale.launch.code import difference

CLOCK_WARN, CLOCK_FAIL = 1.0, 10.0  # seconds; logs and leases compare times of different nodes
REMEDIES = {
    "code": "install the same version everywhere, or use one shared installation",
    "versions": "install the same versions everywhere (constraints.txt)",
    "files": "copy the file to every node, or put it on a shared file system",
}


def between(answers: list[Answer], this_machine: Answer) -> list[Finding]:
    """What does not agree.

    Args:
        answers: of the nodes.
        this_machine: facts of the machine that asks, which the nodes are compared with.
    """
    heard = [answer for answer in answers if answer.facts]
    findings = [_clock(answer) for answer in heard]
    for kind, remedy in REMEDIES.items():
        ours = this_machine.facts[kind]
        for answer in heard:
            if words := difference(ours, answer.facts[kind]):
                findings.append(Finding(kind, FAIL, f"differs from this machine: {words}", remedy, answer.node))
            else:
                findings.append(Finding(kind, OK, f"{len(ours)} the same as here", node=answer.node))
    counts = {answer.facts["gpus"] for answer in heard}
    if len(counts) > 1:
        most = max(counts)
        for answer in heard:
            if answer.facts["gpus"] < most:
                found = f"{answer.facts['gpus']} GPUs, others have {most}"
                findings.append(Finding("gpus", WARN, found, "look for a lost GPU, or --exclude the node", answer.node))
    return findings + _data(answers)


def _clock(answer: Answer) -> Finding:
    offset, doubt = answer.offset, answer.uncertainty
    surely = max(0.0, abs(offset) - doubt)
    words = f"{offset:+.3f} s against this machine (known to {doubt:.3f} s)"
    if surely < CLOCK_WARN:
        return Finding("clock", OK, words, node=answer.node)
    remedy = "start chrony or systemd-timesyncd on the node: `timedatectl set-ntp true`"
    return Finding("clock", FAIL if surely > CLOCK_FAIL else WARN, words, remedy, answer.node)


def _data(answers: list[Answer]) -> list[Finding]:
    """Nodes whose set is another than that of most."""
    seen = {a.node: each.found for a in answers for each in a.findings if each.check == "data" and each.state == OK}
    if len(set(seen.values())) < 2:
        return []
    usual = max(set(seen.values()), key=list(seen.values()).count)
    remedy = "copy the same set to every node"
    return [
        Finding("data", FAIL, f"another set than on the other nodes: {found}", remedy, node)
        for node, found in seen.items()
        if found != usual
    ]
