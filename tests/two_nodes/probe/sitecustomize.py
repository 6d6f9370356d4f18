"""Lets a test see which variables a rank has at its end, as hashes: on the PYTHONPATH of the tests, Python runs it."""

import atexit
import hashlib
import json
import os
import platform
from pathlib import Path


def report():
    if "RANK" in os.environ and "PROBE_FOLDER" in os.environ:
        names = os.environ["PROBE_NAMES"].split(",")
        hashes = {name: hashlib.sha256(os.environ.get(name, "").encode()).hexdigest() for name in names}
        file = f"reached-{platform.node()}-{os.environ['RANK']}-{os.getpid()}.json"
        Path(os.environ["PROBE_FOLDER"], file).write_text(json.dumps(hashes))


atexit.register(report)
