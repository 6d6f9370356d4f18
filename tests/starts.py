"""Several starts of `repa-scale train`, one after another in one process, so that a test pays for the imports once.

python tests/starts.py PLAN RESULTS

PLAN: a JSON list of starts, each {"words": [...]}. With "key": [class, name, default, before] a start first adds a
configuration key that only these tests know; with "stale": true this rank sees no run in the folder until it has joined
the others. RESULTS: for each start {"code", "errors"}.
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
            cls, name, default, before = start["key"]
            add_key(cls, name, schema.added(default, before=before))
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), stale() if start.get("stale") else contextlib.nullcontext():
            code = train(start["words"])
        found.append({"code": code, "errors": errors.getvalue()})
        Path(results).write_text(json.dumps(found))


def add_key(cls: str, name: str, default: object) -> None:
    """Adds a key to a section of the configuration, as a later version would declare it.

    Args:
        cls: a dataclass of config.py.
        default: a string, or what `config.added` returns.
    """
    section = getattr(schema, cls)
    for field in dataclasses.fields(section):
        setattr(section, field.name, field)  # `dataclass` left its default there
    for method in ("__init__", "__repr__", "__eq__"):
        delattr(section, method)  # `dataclass` replaces none
    section.__annotations__[name] = "str"
    setattr(section, name, default)
    dataclasses.dataclass(section)


@contextlib.contextmanager
def stale():
    """A file system that shows a new file late: the first look at the run folder finds nothing."""
    from repa_scale import run_folder

    original, looks = run_folder.stored_identity, []

    def look(path: Path) -> dict | None:
        looks.append(path)
        return original(path) if len(looks) > 1 else None

    run_folder.stored_identity = look
    try:
        yield
    finally:
        run_folder.stored_identity = original


def train(words: list[str]) -> int:
    from repa_scale import train

    train._leave = lambda: None  # all starts share one process group, as DeepSpeed keeps it
    log = logging.getLogger("repa_scale")
    try:
        return train.main(words)
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
