"""The table of checks: a name, and the function that looks. A new check is a function and a row here."""

from __future__ import annotations

from collections.abc import Callable

from repa_scale.doctor import fork, gpus, machine, reach, software
from repa_scale.doctor.finding import Finding, Look

CHECKS: dict[str, Callable[[Look], list[Finding]]] = {
    "python": software.python,
    "packages": software.packages,
    "compiler": software.compiler,
    "cuda": software.cuda,
    "gpus": gpus.gpus,
    "nvlink": gpus.nvlink,
    "xid": gpus.xid,
    "name": machine.own_name,
    "limits": machine.limits,
    "fork": fork.fork,
    "shm": machine.shared_memory,
    "disk": machine.disk,
    "port": machine.port,
    "mlflow": reach.mlflow,
    "data": reach.data,
    "weights": reach.weights,
}
