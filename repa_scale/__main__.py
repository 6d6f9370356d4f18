"""`python -m repa_scale VERB`, so that launchers can start any verb on many processes."""

import sys

from repa_scale.cli import main

if __name__ == "__main__":
    sys.exit(main())
