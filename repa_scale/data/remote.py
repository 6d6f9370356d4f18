"""A set in an object store, read through a cache folder on a local disk (fetcher.py fills it)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repa_scale.data.fetcher import PATIENCE, socket_name
from repa_scale.data.mds import MdsReader, OpenShard, Shard
from repa_scale.data.order import WINDOW
from repa_scale.errors import ConfigError, DataError, UserError, require

START_PATIENCE = 60.0  # seconds for a fetcher to be there: it imports streaming first
TRIES = 5  # a shard may be evicted between the fetcher's word and the opening of the file
log = logging.getLogger("repa_scale")


def cache_folder(url: str, cache: str) -> Path:
    """The folder of one remote set among others in `cache`."""
    return Path(cache) / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


class RemoteReader(MdsReader):
    """Random access to the samples of a remote set. Made with its manifest and index already in the folder."""

    def __init__(self, folder: Path, shards: list[Shard], url: str, limit: int | None) -> None:
        super().__init__(folder, shards)
        self.url, self.limit = url, limit
        self._limit = 3 * WINDOW  # an evicted shard's space is free when its last reader has closed it
        self._fetcher = Fetcher(url, self.folder, limit)
        self._expected: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "url": self.url, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"], state["shards"], state["url"], state["limit"])
        self.bad = state["bad"]

    def verify(self, which: int) -> None:
        """Nothing yet: the fetcher checks each shard before its first use, also those that the cache holds."""

    def expect(self, shards: Callable[[], list[int]]) -> None:
        wanted = shards()
        if wanted != self._expected:
            self._expected = wanted
            self._fetcher.ask({"expect": wanted})

    def opened(self, which: int) -> OpenShard:
        for _ in range(TRIES):
            answer = self._fetcher.ask({"need": which})
            if "bad" in answer:
                raise DataError(answer["bad"])
            try:
                return OpenShard(self.folder, self.shards[which])
            except DataError:
                if (self.folder / self.shards[which].basename).exists():
                    raise
        raise UserError(f"{self.folder}: shards are evicted before they can be read; give a larger data.cache_limit")


def open_remote(url: str, cache: str, limit: int | None) -> Path:
    """Brings the manifest and index of a remote set into its cache folder, and returns that.

    Raises:
        ConfigError: no cache folder is given.
        UserError: the store cannot be reached, or it has no set there.
    """
    if not cache:
        raise ConfigError(f"data.remote={url} needs data.cache=FOLDER, a folder on a local disk")
    if find_spec("streaming") is None:
        require("streaming", "data")
    folder = cache_folder(url, cache)
    answer = Fetcher(url, folder, limit).ask({"open": True})
    if "bad" in answer:
        raise DataError(f"data.remote={url} is not a prepared set: {answer['bad']}")
    if answer["limit"] != limit:
        log.warning("%s is in use by another run: its data.cache_limit of %s bytes holds", folder, answer["limit"])
    return folder


def check_limit(reader: RemoteReader, text: str) -> None:
    """Raises `ConfigError` where two windows of shards, which training needs at a time, do not fit."""
    largest = sorted((shard.bytes for shard in reader.shards), reverse=True)[: 2 * WINDOW]
    if reader.limit is not None and reader.limit < sum(largest):
        raise ConfigError(
            f"data.cache_limit={text} is below {sum(largest) / 1e9:.3g} GB, which the {len(largest)} shards take that "
            "are in use at a time; give at least that"
        )


class Fetcher:
    """The line to the fetcher of a folder; starts one where there is none, also after it was killed."""

    def __init__(self, url: str, folder: Path, limit: int | None) -> None:
        self.url, self.folder, self.limit = url, folder, limit
        self._line = None
        self._owner = 0

    def ask(self, request: dict) -> dict:
        """The answer: `bad` where the store's file is wrong.

        Raises:
            UserError: the store or the fetcher cannot be reached.
        """
        deadline = time.monotonic() + PATIENCE + START_PATIENCE
        while True:
            try:
                answer = self._exchange(request)
            except (OSError, ValueError) as error:
                self._line = None  # it was killed: the next one goes on
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{self.folder}: the process that fetches from {self.url} does not answer ({error}); "
                        f"see {self.folder / 'fetcher.log'}"
                    ) from None
                time.sleep(0.1)
                continue
            if "away" in answer:
                raise UserError(f"data.remote={self.url}: {answer['away']}")
            return answer

    def _exchange(self, request: dict) -> dict:
        if self._line is None or self._owner != os.getpid():  # a forked copy needs a line of its own
            self._line, self._owner = self._connected(), os.getpid()
        self._line.write(json.dumps(request).encode() + b"\n")
        self._line.flush()
        line = self._line.readline()
        if not line:
            raise OSError("the line was cut")
        return json.loads(line)

    def _connected(self):
        deadline, started = time.monotonic() + START_PATIENCE, None
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE + START_PATIENCE)
            try:
                connection.connect(socket_name(self.folder))
                return connection.makefile("rwb")
            except ConnectionRefusedError:
                connection.close()
                if started is None or started.poll() is not None:
                    started = self._start()
                if time.monotonic() > deadline:
                    raise OSError("it does not start") from None
                time.sleep(0.2)

    def _start(self) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        words = [self.url, str(self.folder), *([str(self.limit)] if self.limit is not None else [])]
        return subprocess.Popen(
            [sys.executable, "-m", "repa_scale.data.fetcher", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a stop signal to the job leaves it alone; it ends by itself
        )
