"""Exit codes, the errors that a user can act on, and the check for missing extras."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from enum import IntEnum
from types import ModuleType


class ExitCode(IntEnum):
    """What a run tells its launcher (docs/run_folder.md)."""

    COMPLETED = 0
    BAD_INPUT = 64  # the user's configuration or input is wrong
    DIVERGED = 65
    FAILED = 70
    PREEMPTED = 75  # saved; start the same command again to go on


INTERRUPTED = 130  # of a process that Ctrl-C ended, as a shell says it
OUTCOME_VARIABLE = "REPA_SCALE_OUTCOMES"  # a folder of `repa-scale supervise`, where each rank says how it ended
SWEEP_VARIABLE = "REPA_SCALE_SWEEP"  # the name of the sweep that a run belongs to: the tag `sweep` in MLflow


class UserError(Exception):
    """A mistake that the user can mend. Its text is one line: the value, the rule, the remedy."""


class ConfigError(UserError):
    """A configuration that cannot work."""


class MachineError(ConfigError):
    """A machine that can't run the configuration. Other machines of the run may be well."""


class DataError(UserError):
    """Input data that is missing, damaged or of another shape than promised."""


def require(module: str, extra: str) -> ModuleType:
    """Imports `module`; where it is absent, raises `UserError` with the one line that installs it.

    Args:
        module: dotted name, such as `"mlflow"`.
        extra: the extra of this package that brings it, such as `"track"`.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise UserError(
            f"{module.split('.')[0]} is not installed; install it with: pip install 'repa-scale[{extra}]'"
        ) from None


LOST = "lost the connection to another rank; see how the others ended"
# gloo's and NCCL's words for a process at the other end that is gone.
LOST_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


def reason(error: BaseException) -> str:
    """What went wrong in a foreign library, on one line: the head of its text, and of its innermost cause's."""
    cause = error
    while inner := cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__):
        cause = inner
    return ", because: ".join(dict.fromkeys((_head(error), _head(cause))))


def summary(error: BaseException) -> str:
    """An error that no user can fix, on one line: its type and `reason`. One that only says that another rank is gone
    begins with LOST, because that rank has the cause."""
    text = f"{type(error).__name__}: {reason(error)}"
    return f"{LOST} ({text})" if any(sign in str(error) for sign in LOST_SIGNS) else text


def _head(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # torch's "Error(s) in loading state_dict:" says nothing without the line that follows.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= 240 else text[:240] + "..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `known`, else the list of what is known."""
    names = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
