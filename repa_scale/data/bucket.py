"""A prepared set in an object store: finished shards are uploaded part by part, index and manifest last.

streaming's uploaders and downloaders do the transfer, so every URL that it understands is one here. Beside the set,
under .prepare/, stands what is known of each finished part: a preparation goes on from there, also on another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from repa_scale import torchvision_fix
from repa_scale.data.manifest import MANIFEST, link, write_file
from repa_scale.errors import DataError, UserError, reason, require

WORK = ".prepare"
RETRIES = 5


def is_url(out: str) -> bool:
    return "://" in out


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
        torchvision_fix.ensure()
        require("streaming", "data")
        from streaming.base.storage.upload import UPLOADERS, CloudUploader

        self.url, self.scratch = url.rstrip("/"), scratch
        scheme = url.split("://", 1)[0]
        if scheme not in UPLOADERS:
            known = ", ".join(sorted(name for name in UPLOADERS if name and ":" not in name))
            raise UserError(f"--out {url}: {scheme}:// is no store that streaming writes to; known: {known}")
        # The uploader takes files from here, under the names that they shall have there.
        self.staging = scratch / WORK / "upload"
        self.staging.mkdir(parents=True, exist_ok=True)
        self._uploader = self._told(
            lambda: CloudUploader.get((str(self.staging), self.url), keep_local=True, retry=RETRIES, exist_ok=True)
        )
        self._finished: set[int] | None = None

    def read(self, name: str) -> bytes | None:
        """An object of the set; None: there is none."""
        if name not in self._names(name):
            return None
        from streaming.base.storage.download import CloudDownloader

        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            local = os.path.join(folder, "object")
            self._told(lambda: CloudDownloader.direct_download(f"{self.url}/{name}", local))
            return Path(local).read_bytes()

    def claim(self, job: dict[str, Any]) -> None:
        """Takes the URL for this job, or finds that it is the one to go on with.

        Raises:
            DataError: another preparation stands there.
        """
        state = self.read(f"{WORK}/job.json")
        if state is not None:
            if json.loads(state) != job:
                raise DataError(
                    f"--out {self.url} holds the beginning of another preparation (other images or another recipe); "
                    "choose another URL"
                )
            return
        if self._names(""):
            raise DataError(f"--out {self.url} is not empty; choose another URL")
        self._put_json(f"{WORK}/job.json", job)

    def finished(self, number: int) -> dict[str, Any] | None:
        """What is known of a part that has been uploaded."""
        if self._finished is None:
            names = self._names(f"{WORK}/part_")
            self._finished = {int(name.removesuffix(".json").rsplit("_", 1)[1]) for name in names}
        if number not in self._finished:
            return None
        return json.loads(self.read(f"{WORK}/part_{number:05d}.json"))

    def put_part(self, number: int, folder: Path, done: dict[str, Any]) -> dict[str, Any]:
        """Uploads a part's shards under their final names, then what is known of it; the local part is removed."""
        for count, row in enumerate(done["shards"]):
            name = f"shard.{number:05d}.{count:03d}.mds"
            self._put_file(folder / row["raw_data"]["basename"], name)
            row["raw_data"]["basename"] = name
        self._put_json(f"{WORK}/part_{number:05d}.json", done)
        shutil.rmtree(folder)
        return done

    def put_files(self, folder: Path, names: list[str]) -> None:
        """Uploads small files of the set, in order."""
        for name in names:
            self._put_file(folder / name, name)

    def manifest(self) -> dict[str, Any] | None:
        """`dataset.json` of a finished set; None: it is not finished."""
        data = self.read(MANIFEST)
        return None if data is None else json.loads(data)

    def _put_json(self, name: str, value: dict[str, Any]) -> None:
        path = self.scratch / WORK / f"{Path(name).stem}.upload"
        write_file(path, json.dumps(value).encode())
        self._put_file(path, name)
        path.unlink()

    def _put_file(self, path: Path, name: str) -> None:
        """The file stays where it is until it has been uploaded, so that a failure costs nothing."""
        staged = self.staging / name
        staged.parent.mkdir(parents=True, exist_ok=True)
        link(path, staged)
        self._told(lambda: self._uploader.upload_file(name))
        staged.unlink()

    def _names(self, prefix: str) -> list[str]:
        """Names below the URL that begin with `prefix`."""
        keys = self._told(lambda: self._uploader.list_objects(prefix)) or []
        base = self.url.split("://", 1)[1].partition("/")[2]
        head = f"{base}/" if base else ""
        return [key.removeprefix(head) for key in keys if key.startswith(head + prefix)]

    def _told(self, act: Callable[[], Any]) -> Any:
        """What goes wrong with the store, in one line."""
        try:
            return act()
        except UserError:
            raise
        except Exception as error:  # each store's library raises its own
            raise UserError(
                f"--out {self.url} does not answer as it should ({reason(error)}); the same command goes on"
            ) from None


def remove_scratch(scratch: Path) -> None:
    """Once the set stands in its store."""
    with suppress(OSError):
        shutil.rmtree(scratch)
