"""CUDA_VISIBLE_DEVICES of a node: which of its GPUs the slots of a job are.

A slot is a place in that list, as it is in torch; deepspeed would take it for the GPU's own number. Standard library
alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from repa_scale.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"
NUMBER, UUID, MIG = re.compile(r"\d+"), re.compile(r"GPU-[0-9a-fA-F-]+"), re.compile(r"MIG-[0-9a-zA-Z/-]+")
HIDDEN = "NoDevFiles"  # Slurm's value for a job without GPUs
FORMS = "give numbers (4,5) or UUIDs (GPU-..., from nvidia-smi -L), of one kind"


def visible(value: str | None, where: str = "") -> list[str] | None:
    """The GPUs that a value shows, in its order; none: it hides all; None: no value, all GPUs in the driver's order.

    CUDA ends the list at the first entry that it does not understand and shows nothing where one comes twice, without
    a word: both are refused here.

    Args:
        where: of whom the value is, for the error: empty, or `node-2: `.

    Raises:
        ConfigError: CUDA would show other GPUs than the value names.
    """
    if value is None:
        return None
    entries = [entry.strip() for entry in value.split(",")]
    if entries[0] == HIDDEN or entries == [""] or re.fullmatch(r"-\d+", entries[0]):
        return []
    if entries[-1] == "":  # a comma at the end ends nothing early
        entries.pop()
    said = f"{where}{VARIABLE}={value}"
    for kind in (NUMBER, UUID, MIG):
        if kind.fullmatch(entries[0]):
            break
    for entry in entries:
        if not kind.fullmatch(entry):
            raise ConfigError(f"{said}: CUDA ends the list at {entry!r}; {FORMS}")
    if kind is NUMBER:
        entries = [str(int(entry)) for entry in entries]
    twice = next((entry for entry in entries if entries.count(entry) > 1), None)
    if twice is not None:
        raise ConfigError(f"{said}: {twice} stands there twice, and CUDA then shows no GPU; name each once")
    return entries


def gpus_of(slots: Sequence[int], value: str | None, where: str = "") -> str | None:
    """CUDA_VISIBLE_DEVICES for the ranks of `slots`: local rank k has the GPU at place k. None: what deepspeed sets.

    Raises:
        ConfigError: there is no GPU for a slot, or the ranks cannot work on what the value names.
    """
    shown = visible(value, where)
    if shown is None:
        return None
    if not shown:
        return value  # hidden: on the CPU
    said = f"{where}{VARIABLE}={value}"
    if max(slots) >= len(shown):
        raise ConfigError(
            f"{said} shows {'1 GPU' if len(shown) == 1 else f'{len(shown)} GPUs'}, and slot {max(slots)} "
            "is asked for (slots count from 0 in that list); ask for fewer (--num_gpus, --include), or show more"
        )
    chosen = [shown[slot] for slot in slots]
    if len(chosen) > 1 and MIG.fullmatch(chosen[0]):
        raise ConfigError(
            f"{said}: a process sees one MIG instance, so ranks of one node cannot share such a list; use whole GPUs, "
            "or one rank per node (--num_gpus 1)"
        )
    return ",".join(chosen)
