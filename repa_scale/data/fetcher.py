"""The process that fills a cache folder from a remote set: one for each folder and machine, started by who needs it.

    python -m repa_scale.data.fetcher URL FOLDER [LIMIT]

It alone downloads into the folder, verifies what came, and evicts; readers ask for a shard over a local socket and open
the file when told that it is there (remote.py). So a shard comes once a machine however many processes want it, two
runs share one cache, and only this process imports streaming, whose downloaders do the transfer. It ends when nobody
has been connected for a while; nothing of it stays behind however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socketserver
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from repa_scale.data.manifest import MANIFEST
from repa_scale.data.mds import Shard, read_index, verify_shard
from repa_scale.errors import DataError, UserError, reason

PATIENCE = 300.0  # seconds that a store may be away
IDLE = 30.0  # seconds without a reader
AHEAD = 4  # shards fetched at a time before anybody waits for them
log = logging.getLogger("repa_scale.fetcher")


class Bad(Exception):
    """What the store has is not what was prepared."""


class Away(Exception):
    """The store did not answer for PATIENCE seconds."""


def socket_name(folder: Path) -> str:
    """An abstract address, which is gone when its process is."""
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
    return f"\0repa_scale-{os.getuid()}-{key}"


class Cache:
    """The shards of one remote set in one folder.

    Args:
        limit: bytes that they may take; None: all of them.
    """

    def __init__(self, url: str, folder: Path, limit: int | None) -> None:
        self.url, self.folder, self.limit = url.rstrip("/"), folder, limit
        self.shards: list[Shard] = []
        self._verified: set[int] = set()
        self._used: dict[int, float] = {}
        self._wanted: set[int] = set()
        self._coming: dict[int, int] = {}  # bytes that are on their way, by shard
        self._locks: dict[int, threading.Lock] = {}
        self._room = threading.Lock()
        self._opening = threading.Lock()
        self._ahead = ThreadPoolExecutor(AHEAD)

    def open(self) -> None:
        """Brings manifest and index up to date."""
        with self._opening:
            for name in (MANIFEST, "index.json"):
                self._download(name, self.folder / name, lambda path: None)
            self._take(read_index(self.folder))

    def go_on(self) -> None:
        """Takes up the work of a fetcher that was killed: its readers know the index already."""
        with self._opening:
            if not self.shards:
                self._take(read_index(self.folder))

    def _take(self, shards: list[Shard]) -> None:
        if shards != self.shards:
            self._verified.clear()
            self._locks = {number: threading.Lock() for number in range(len(shards))}
            self.shards = shards

    def need(self, number: int) -> None:
        """Returns when the shard lies in the folder, verified."""
        shard = self.shards[number]
        path = self.folder / shard.basename
        self._used[number] = time.monotonic()
        with self._locks[number]:
            if path.exists() and number not in self._verified:
                try:
                    verify_shard(self.folder, shard)
                except DataError as error:
                    log.warning("%s; it is fetched again", error)
                    path.unlink()
            if not path.exists():
                self._make_room(shard.bytes, number)
                try:
                    self._download(shard.basename, path, lambda file: _check(file, shard))
                finally:
                    self._coming.pop(number)
            self._verified.add(number)

    def expect(self, numbers: list[int]) -> None:
        """These will be read next: what is not there is fetched behind the readers' backs."""
        self._wanted = set(numbers)
        for number in numbers:
            self._used[number] = time.monotonic()
            if not (self.folder / self.shards[number].basename).exists():
                self._ahead.submit(self._try, number)

    def _try(self, number: int) -> None:
        try:
            self.need(number)
        except (Bad, Away, OSError) as error:  # whoever needs it will hear of it
            log.info("ahead of time: %s", error)

    def _make_room(self, size: int, wanted: int) -> None:
        """Removes the shards unused for the longest until `size` bytes more fit; readers that have one open go on."""
        with self._room:
            self._coming[wanted] = size
            if self.limit is None:
                return
            held = [n for n in range(len(self.shards)) if n != wanted and self._path(n).exists()]
            held.sort(key=lambda n: (n in self._wanted, self._used.get(n, 0.0)))
            total = sum(self.shards[n].bytes for n in held if n not in self._coming) + sum(self._coming.values())
            for number in held:
                if total <= self.limit:
                    break
                self._path(number).unlink(missing_ok=True)
                self._verified.discard(number)
                total -= self.shards[number].bytes

    def _path(self, number: int) -> Path:
        return self.folder / self.shards[number].basename

    def _download(self, name: str, path: Path, check) -> None:
        """Into place whole and checked, or not at all. A store that is away is asked again, a wrong file once."""
        from streaming.base.storage.download import CloudDownloader

        temporary = self.folder / f".fetching-{os.getpid()}-{threading.get_ident()}"
        deadline, pause, wrong = time.monotonic() + PATIENCE, 0.5, ""
        while True:
            temporary.unlink(missing_ok=True)
            try:
                CloudDownloader.direct_download(f"{self.url}/{name}", str(temporary))
                check(temporary)
                os.replace(temporary, path)
                return
            except Exception as error:  # each store's library has its own kinds
                if isinstance(error, DataError) or _missing(error):
                    text = str(error) if isinstance(error, DataError) else f"{self.url}/{name} does not exist"
                    if wrong:
                        raise Bad(f"{text}, twice") from None
                    wrong = text
                    continue
                if _full(error):
                    raise Away(f"{self.folder} is full; make room or give a smaller data.cache_limit") from None
                if time.monotonic() > deadline:
                    raise Away(f"{self.url}/{name} cannot be had for {PATIENCE:.0f} s: {reason(error)}") from None
                log.info("%s: %s; again in %.1f s", name, reason(error), pause)
                time.sleep(pause)
                pause = min(2 * pause, 10.0)
            finally:
                temporary.unlink(missing_ok=True)


def _check(file: Path, shard: Shard) -> None:
    verify_shard(file.parent, Shard(file.name, shard.bytes, shard.hashes, shard.samples, shard.columns))


def _missing(error: BaseException) -> bool:
    """The store answers that there is no such object: streaming's own words for every kind of store."""
    return isinstance(error, FileNotFoundError) or "not found" in str(error).lower()


def _full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == 28


class Handler(socketserver.StreamRequestHandler):
    """One reader: a line of JSON in, a line out, until it goes."""

    def handle(self) -> None:
        server = self.server
        with server.counted():
            for line in self.rfile:
                try:
                    answer = self._answer(server.cache, json.loads(line))
                except Bad as error:
                    answer = {"bad": str(error)}
                except (Away, OSError, UserError) as error:
                    answer = {"away": str(error)}
                except Exception as error:  # else the reader would hear nothing, and ask again
                    log.exception("while answering %r", line)
                    answer = {"away": f"{type(error).__name__}: {error}"}
                try:
                    self.wfile.write(json.dumps(answer).encode() + b"\n")
                except OSError:
                    return

    @staticmethod
    def _answer(cache: Cache, request: dict) -> dict:
        if "open" in request:
            cache.open()
            return {"limit": cache.limit, "url": cache.url}
        cache.go_on()
        if "need" in request:
            cache.need(request["need"])
        else:
            cache.expect(request["expect"])
        return {}


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: str, cache: Cache) -> None:
        super().__init__(address, Handler)
        self.cache = cache
        self.readers, self.alone_since = 0, time.monotonic()
        self._counting = threading.Lock()

    def counted(self):
        return _Counted(self)

    def serve(self) -> None:
        """Until nobody has been there for IDLE seconds."""
        self.timeout = 1.0
        while self.readers > 0 or time.monotonic() - self.alone_since < IDLE:
            self.handle_request()


class _Counted:
    def __init__(self, server: Server) -> None:
        self.server = server

    def __enter__(self) -> None:
        with self.server._counting:
            self.server.readers += 1

    def __exit__(self, *_: object) -> None:
        with self.server._counting:
            self.server.readers -= 1
            self.server.alone_since = time.monotonic()


def main(argv: list[str]) -> int:
    url, folder = argv[0], Path(argv[1])
    limit = int(argv[2]) if len(argv) > 2 else None
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(filename=folder / "fetcher.log", format="%(asctime)s %(message)s")
    log.setLevel(logging.INFO)
    with (folder / "fetcher.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return 0  # another one was quicker
        for left in folder.glob(".fetching-*"):  # by one that was killed
            left.unlink()
        from repa_scale import torchvision_fix

        torchvision_fix.ensure()
        import streaming.base.storage.download  # noqa: F401  before anybody waits

        with Server(socket_name(folder), Cache(url, folder, limit)) as server:
            server.serve()
        os._exit(0)  # downloads that nobody waits for any more


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
