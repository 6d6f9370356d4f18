"""An S3-compatible object store on localhost (moto's server, a real process) for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import free_port

ENVIRONMENT = {  # of any client: streaming reads the address from the first
    "S3_ENDPOINT_URL": "http://127.0.0.1:{port}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class S3Server:
    """The server; its objects live in its memory, and end with it.

    Attributes:
        environment: what a client's process needs, boto3's and streaming's names.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.environment = {key: value.format(port=self.port) for key, value in ENVIRONMENT.items()}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.client().list_buckets()
                return
            except Exception:  # botocore raises many kinds while nobody listens
                assert self.process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL: what a crashed store looks like."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self):
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.environment["S3_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=10, retries={"max_attempts": 1}),
        )

    @contextmanager
    def bucket(self, name: str):
        """An empty bucket, which is gone afterwards with all that was put into it."""
        self.client().create_bucket(Bucket=name)
        yield
        client = self.client()
        for entry in client.list_objects_v2(Bucket=name).get("Contents", ()):
            client.delete_object(Bucket=name, Key=entry["Key"])
        client.delete_bucket(Bucket=name)

    def upload(self, folder: Path, bucket: str, prefix: str) -> None:
        """All files below `folder`, into a bucket that is made where it is absent."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                client.upload_file(str(path), bucket, f"{prefix}/{path.relative_to(folder).as_posix()}")

    def download(self, bucket: str, prefix: str, folder: Path) -> list[str]:
        """All objects under `prefix` into `folder`; returns their names below it."""
        client, names = self.client(), []
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(f"{prefix}/")
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, entry["Key"], str(folder / name))
                names.append(name)
        return names


@contextmanager
def running_s3_server():
    """A server, with its address in this process's environment."""
    pytest.importorskip("moto")
    server = S3Server()
    before = {key: os.environ.get(key) for key in server.environment}
    server.start()
    os.environ.update(server.environment)
    try:
        yield server
    finally:
        server.kill()
        for key, value in before.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})


@pytest.fixture(scope="module")
def s3_server():
    """Import it into a test module to use it: `from s3_server import s3_server`."""
    with running_s3_server() as server:
        yield server
