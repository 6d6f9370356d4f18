"""`python -m repa_scale VERB`, so that launchers can start any verb on many processes; and `repa-scale VERB`."""

from repa_scale.cli import main
from repa_scale.processes import end_process


def run() -> None:
    """The whole life of a process of ours."""
    end_process(main())


if __name__ == "__main__":
    run()
