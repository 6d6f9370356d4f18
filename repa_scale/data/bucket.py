"""A prepared set in an object store: finished shards are uploaded part by part, index and manifest last.

Beside the set, under .prepare/, stands what is known of each finished part: a preparation goes on from there, also on
another machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from repa_scale.data.features import why_another
from repa_scale.data.manifest import MANIFEST
from repa_scale.errors import DataError
from repa_scale.files import write_durably
from repa_scale.object_store import ObjectStore

WORK = ".prepare"


def scratch_for(url: str, parent: Path) -> Path:
    """The local folder of a preparation to `url`: the same each time, so that the same command goes on."""
    return parent / f"prepare-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


class Bucket:
    """One set under a URL.

    Args:
        url: such as `s3://bucket/folder`.
        scratch: a local folder for what is in work.

    Raises:
        UserError: streaming does not know the URL's kind, or the bucket does not answer.
    """

    def __init__(self, url: str, scratch: Path) -> None:
        self.scratch = scratch
        self._store = ObjectStore(url, scratch / WORK, "--out")
        self._finished: set[int] | None = None

    @property
    def url(self) -> str:
        return self._store.url

    def claim(self, job: dict[str, Any]) -> None:
        """Takes the URL for this job, or finds that it is the one to go on with.

        Raises:
            DataError: another preparation stands there.
        """
        state = self._store.read(f"{WORK}/job.json")
        if state is not None:
            if reason := why_another(json.loads(state), job):
                raise DataError(
                    f"--out {self.url} holds the beginning of another preparation ({reason}); choose another URL"
                )
            return
        if self._store.names():
            raise DataError(f"--out {self.url} is not empty; choose another URL")
        self._put_json(f"{WORK}/job.json", job)

    def finished(self, number: int) -> dict[str, Any] | None:
        """What is known of a part that has been uploaded."""
        if self._finished is None:
            names = self._store.names(f"{WORK}/part_")
            self._finished = {int(name.removesuffix(".json").rsplit("_", 1)[1]) for name in names}
        if number not in self._finished:
            return None
        return json.loads(self._store.read(f"{WORK}/part_{number:05d}.json"))

    def put_part(self, number: int, folder: Path, done: dict[str, Any]) -> dict[str, Any]:
        """Uploads a part's shards under their final names, then what is known of it; the local part is removed."""
        for count, row in enumerate(done["shards"]):
            name = f"shard.{number:05d}.{count:03d}.mds"
            self._store.put(folder / row["raw_data"]["basename"], name)
            row["raw_data"]["basename"] = name
        self._put_json(f"{WORK}/part_{number:05d}.json", done)
        shutil.rmtree(folder)
        return done

    def put_files(self, folder: Path, names: list[str]) -> None:
        """Uploads small files of the set, in order."""
        for name in names:
            self._store.put(folder / name, name)

    def manifest(self) -> dict[str, Any] | None:
        """`dataset.json` of a finished set; None: it is not finished."""
        data = self._store.read(MANIFEST)
        return None if data is None else json.loads(data)

    def _put_json(self, name: str, value: dict[str, Any]) -> None:
        path = self.scratch / WORK / f"{Path(name).stem}.upload"
        write_durably(path, json.dumps(value))
        self._store.put(path, name)
        path.unlink()


def remove_scratch(scratch: Path) -> None:
    """Once the set stands in its store."""
    with suppress(OSError):
        shutil.rmtree(scratch)
