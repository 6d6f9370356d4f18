"""Checks of a node's GPUs, through nvidia-smi and the kernel's log."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from repa_scale.doctor.finding import FAIL, NOTE, OK, WARN, Finding, Look
from repa_scale.errors import ConfigError
from repa_scale.launch import visible

QUERY = "index,name,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
FREE = 0.97  # share of the memory that must be free: no other process


def gpus(look: Look) -> list[Finding]:
    """Number, memory that others hold, uncorrected ECC errors."""
    if shutil.which("nvidia-smi") is None:
        return [Finding("gpus", NOTE, "none (no nvidia-smi); the run would use the CPU")]
    try:
        rows = _rows("--query-gpu", QUERY)
        if not rows or any(len(row) != len(QUERY.split(",")) for row in rows):
            raise ValueError(f"it answers {'; '.join(map(', '.join, rows)) or 'nothing'}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [
            Finding("gpus", FAIL, f"nvidia-smi fails: {error}", "reload the driver, or reboot the node; see `dmesg`")
        ]
    names = sorted({row[1] for row in rows})
    findings = []
    try:
        visible.gpus_of(range(look.slots or 1), os.environ.get(visible.VARIABLE))
    except ConfigError as error:
        found, _, remedy = str(error).partition("; ")
        findings.append(Finding("gpus", FAIL, found, remedy))
    if look.slots is not None and len(rows) < look.slots:
        found = f"{len(rows)} GPUs, the host file says slots={look.slots}"
        findings.append(Finding("gpus", FAIL, found, "mend slots=, or look for a lost GPU (`dmesg`, `nvidia-smi`)"))
    if len(names) > 1:
        findings.append(
            Finding("gpus", WARN, f"different models: {', '.join(names)}", "the slowest decides; --include equal ones")
        )
    for index, _, total, used, ecc in rows:
        if _number(used) > (1 - FREE) * _number(total):
            found = f"GPU {index}: {_number(used):,.0f} of {_number(total):,.0f} MiB are taken"
            findings.append(
                Finding("gpus", FAIL, f"{found}{_owners()}", "end the other processes, or --exclude this GPU")
            )
        if _number(ecc) > 0:
            found = f"GPU {index}: {ecc} uncorrected ECC errors since the last reset"
            findings.append(
                Finding("gpus", FAIL, found, "drain the node and reset the GPU; replace it if they come again")
            )
    return findings or [
        Finding("gpus", OK, f"{len(rows)} x {names[0]}, {_number(rows[0][2]) / 1024:.0f} GiB, free, no ECC errors")
    ]


def _owners() -> str:
    rows = _rows("--query-compute-apps", "pid,process_name,used_memory")
    return "".join(f", process {pid} ({name})" for pid, name, _ in rows[:4])


def nvlink(look: Look) -> list[Finding]:
    """Links between the GPUs of the node that are down."""
    if shutil.which("nvidia-smi") is None:
        return []
    text = _smi("nvlink", "--status")
    links, down = len(re.findall(r"Link \d+:", text)), re.findall(r"Link \d+: <?inactive>?", text)
    if down:
        return [
            Finding(
                "nvlink",
                FAIL,
                f"{len(down)} of {links} links are inactive",
                "drain the node; see `nvidia-smi nvlink -e` and fabric manager",
            )
        ]
    if not links:
        return [Finding("nvlink", NOTE, "no NVLink: GPUs exchange over PCIe")]
    return [Finding("nvlink", OK, f"{links} links")]


def xid(look: Look) -> list[Finding]:
    """The driver's errors in the kernel's log since boot."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["dmesg"], capture_output=True, text=True, timeout=20)
    if done.returncode:
        return [Finding("xid", NOTE, "the kernel's log may not be read; as root: dmesg | grep Xid")]
    found = re.findall(r"NVRM: Xid \(([^)]*)\): (\d+)", done.stdout)
    if not found:
        return [Finding("xid", OK, "no Xid errors")]
    numbers = ", ".join(sorted({number for _, number in found}, key=int))
    return [
        Finding(
            "xid",
            WARN,
            f"{len(found)} Xid errors ({numbers}), the last on {found[-1][0]}",
            "look them up in NVIDIA's list of Xid errors; 48, 63, 74, 79, 94, 95 ask for another GPU",
        )
    ]


def _rows(option: str, columns: str) -> list[list[str]]:
    text = _smi(f"{option}={columns}", "--format=csv,noheader,nounits")
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]


def _smi(*words: str) -> str:
    return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=30, check=True).stdout


def _number(text: str) -> float:
    """0 where a GPU does not have the figure (`[N/A]`)."""
    try:
        return float(text)
    except ValueError:
        return 0.0
