"""Several starts of `repa-scale train`, one after another in one process, so that a test pays for the imports once.

python tests/starts.py PLAN RESULTS

PLAN: a JSON list of starts, each {"words": [...]}; a start with {"key": [class, name, type, default, before]} first
adds a configuration key that only these tests know. RESULTS: for each start {"code", "errors"}.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import sys
from pathlib import Path

from repa_scale import config as schema
from repa_scale.sizes import BACKBONES, SiTSize

BACKBONES["SiT-Pico"] = SiTSize(2, 8, 2)  # a checkpoint of it takes 100 KB


def main(plan: str, results: str) -> None:
    found = []
    for start in json.loads(Path(plan).read_text()):
        if "key" in start:
            add_key(*start["key"])
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = train(start["words"])
        found.append({"code": code, "errors": errors.getvalue()})
        Path(results).write_text(json.dumps(found))


def add_key(cls: str, name: str, kind: str, default: object, before: object) -> None:
    """Adds a field to a dataclass of the configuration, as a later version would declare it."""
    section = getattr(schema, cls)
    for field in dataclasses.fields(section):
        setattr(section, field.name, field)  # `dataclass` replaced it with its default
    section.__annotations__[name] = kind
    setattr(section, name, schema.added(default, before=before))
    dataclasses.dataclass(section)


def train(words: list[str]) -> int:
    from repa_scale.ranks import Ranks
    from repa_scale.train import main

    log = logging.getLogger("repa_scale")
    try:
        return main(words)
    finally:
        Ranks.from_environment("cpu").leave()
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
