"""The bar of a long piece of work, on stderr where that is a terminal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress_bar(show: bool = True) -> Progress:
    """For `with`: what is done, of how much, for how long, and the time that remains. It leaves nothing behind.

    Where there is no terminal, or not `show`, its `disable` is true and it costs nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left")
    hidden = not (show and console.is_terminal)
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden, transient=True)


def counter(bar: Progress, what: str, total: int) -> Callable[[int], None]:
    """A line of the bar, as a function to call with what is done since the last call."""
    return partial(bar.advance, bar.add_task(what, total=total))
