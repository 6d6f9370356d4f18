"""`python -m repa_scale VERB`, so that launchers can start any verb on many processes; and `repa-scale VERB`."""

import traceback

from repa_scale.cli import main
from repa_scale.processes import end_process


def run() -> None:
    """The whole life of a process of ours."""
    try:
        code = main()
    except Exception:  # ends like the others: a tear-down of the interpreter may wait for ranks in a collective
        traceback.print_exc()
        code = 1
    end_process(code)


if __name__ == "__main__":
    run()
