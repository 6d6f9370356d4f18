"""Objects under a URL such as `s3://bucket/folder`: put, get, list.

streaming's uploaders and downloaders do the transfer, so every URL that it understands is one here.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repa_scale import torchvision_fix
from repa_scale.errors import UserError, reason, require
from repa_scale.files import link

RETRIES = 5


def is_url(out: str) -> bool:
    return "://" in out


class ObjectStore:
    """Everything below one URL.

    Args:
        url: such as `s3://bucket/folder`.
        scratch: a local folder, for files on their way.
        key: where the user named the URL, for messages.
        hint: what to do about a store that does not answer, for messages.

    Raises:
        UserError: streaming does not know the URL's kind, or the store does not answer.
    """

    def __init__(self, url: str, scratch: Path, key: str, hint: str = "the same command goes on") -> None:
        torchvision_fix.ensure()
        require("streaming", "data")
        from streaming.base.storage.upload import UPLOADERS, CloudUploader

        self.url, self.scratch, self.key, self.hint = url.rstrip("/"), scratch, key, hint
        scheme = url.split("://", 1)[0]
        if scheme not in UPLOADERS:
            known = ", ".join(sorted(name for name in UPLOADERS if name and ":" not in name))
            raise UserError(f"{key} {url}: {scheme}:// is no store that streaming writes to; known: {known}")
        # The uploader takes files from a folder of its own, under the names that they shall have there.
        scratch.mkdir(parents=True, exist_ok=True)
        self._staging = Path(tempfile.mkdtemp(prefix="upload-", dir=scratch))
        self._uploader = self._told(
            lambda: CloudUploader.get((str(self._staging), self.url), keep_local=True, retry=RETRIES, exist_ok=True)
        )

    def close(self) -> None:
        """Removes the staging folder."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def put(self, path: Path, name: str) -> None:
        """Uploads a file under `name`, in place of what is there. The local file stays."""
        staged = self._staging / name
        staged.parent.mkdir(parents=True, exist_ok=True)
        link(path, staged)
        self._told(lambda: self._uploader.upload_file(name))
        staged.unlink()

    def get(self, name: str, path: Path) -> None:
        """Downloads an object to a local file."""
        from streaming.base.storage.download import CloudDownloader

        path.unlink(missing_ok=True)
        self._told(lambda: CloudDownloader.direct_download(f"{self.url}/{name}", str(path)))

    def read(self, name: str) -> bytes | None:
        """A small object; None: there is none."""
        if name not in self.names(name):
            return None
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            local = Path(folder) / "object"
            self.get(name, local)
            return local.read_bytes()

    def names(self, prefix: str = "") -> list[str]:
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
                f"{self.key} {self.url} does not answer as it should ({reason(error)}); {self.hint}"
            ) from None
