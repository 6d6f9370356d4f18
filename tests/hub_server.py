"""A hub of files under a folder, as huggingface_hub's client asks for them; it notes each question in a file.

python tests/hub_server.py FOLDER PORT NOTES        FOLDER/owner/name/file
"""

import hashlib
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + 34 * "0"


class Hub(ThreadingHTTPServer):
    """Args: `lie`: promise another hash than the files have."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0, notes: Path | None = None) -> None:
        super().__init__(("", port), Answer)
        self.folder, self.notes, self.lie, self.asked = folder, notes, False, []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, whole: bool):
        self.server.asked.append(f"{self.command} {self.path}")
        if self.server.notes:
            with self.server.notes.open("a") as notes:
                notes.write(f"{self.client_address[0]} {self.command} {self.path}\n")
        repo, _, name = self.path.partition("/resolve/main/")
        file = self.server.folder / repo.strip("/") / name
        if not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        digest = hashlib.sha256(content + b"lie" * self.server.lie).hexdigest()
        self.send_response(200)
        self.send_header("ETag", f'"{digest}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if whole:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path):
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


if __name__ == "__main__":
    Hub(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])).serve_forever()
