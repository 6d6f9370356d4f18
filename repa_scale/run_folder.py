"""The run folder: its lease, status, metrics and logs (docs/run_folder.md). Written by rank 0 but for the logs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from repa_scale import evaluations
from repa_scale.errors import ConfigError, UserError, require
from repa_scale.files import write_atomically
from repa_scale.lease import holder_now, look, read_lease, take_lease
from repa_scale.redact import RedactedFormatter, redacted

HEARTBEAT_SECONDS = 10.0

log = logging.getLogger("repa_scale")


class RunFolder:
    """One attempt at a run: opened by `open_run`, closed by `close`."""

    def __init__(self, path: Path, attempt: int, before: str = "") -> None:
        self.path = path
        self.before = before  # the state that the start before left
        self.attempt = attempt
        self.checkpoints = path / "checkpoints"
        self._status = {"state": "running", "step": 0, "attempt": attempt, "reason": ""}
        self._write_lock = threading.Lock()
        self._closed = threading.Event()
        self._token = str(read_lease(path).get("token"))
        self._taken_by = ""
        self._metrics = (path / "metrics.jsonl").open("ab", buffering=0)
        self._unwritten = b""  # of metrics.jsonl, while the disk is full
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._write_status()
        self._heart.start()

    def record(self, row: dict) -> None:
        """Appends one row to metrics.jsonl; what is not finite is written as the strings "nan", "inf", "-inf".

        A full disk ends no run here: the rows wait in memory for the next call.
        """
        self._unwritten += _json_line(row).encode()
        self._write_rows()

    def _write_rows(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._metrics.write(self._unwritten) :]
        except OSError as error:
            log.error("metrics.jsonl: %s; %d bytes of it wait in memory", error, len(self._unwritten))

    def incident(self, kind: str, **facts: object) -> None:
        """Appends to incidents.jsonl what went wrong and was dealt with."""
        try:
            log_incident(self.path, kind, attempt=self.attempt, **facts)
        except OSError as error:
            log.error("incidents.jsonl: %s", error)

    def next_attempt(self) -> None:
        """After a rollback: rows of the same steps that come now count."""
        self.attempt += 1
        self._status["attempt"] = self.attempt
        self._write_status()

    def quarantine(self, row: dict) -> None:
        """Appends one bad sample to quarantine.jsonl, durably."""
        with (self.path / "quarantine.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def quarantined(self) -> set[int]:
        """Numbers of the samples that earlier attempts set aside."""
        path = self.path / "quarantine.jsonl"
        _drop_torn_line(path)
        return {json.loads(line)["number"] for line in path.read_text().splitlines()} if path.exists() else set()

    def progress(self, step: int) -> None:
        """Notes the step for the next heartbeat; costs nothing.

        Raises:
            RuntimeError: another job has taken the folder, since this process was taken for dead.
        """
        if self._taken_by:
            raise RuntimeError(f"{self.path} was taken over by {self._taken_by}; this process stops writing there")
        self._status["step"] = step

    def close(self, state: str, step: int, reason: str = "") -> None:
        """Writes the final state and gives the lease back."""
        self._closed.set()
        if self._heart.is_alive():
            self._heart.join()
        self._write_rows()
        os.fsync(self._metrics.fileno())
        self._metrics.close()
        if self._taken_by:
            return
        self._status.update(state=state, step=step, reason=redacted(reason))
        try:
            self._write_status()
        except OSError as error:
            log.error("status.json does not say %s (%s): %s", state, reason, error)
        if read_lease(self.path).get("token") == self._token:
            (self.path / "lease.json").unlink(missing_ok=True)

    def fail(self, reason: str) -> None:
        """Closes the folder of a run that an error ended, unless it is closed already."""
        if not self._closed.is_set():
            self.close("failed", self._status["step"], reason)

    def _beat(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                holder = read_lease(self.path)
                if holder and holder.get("token") != self._token:
                    self._taken_by = f"process {holder.get('pid')} on {holder.get('host')}"
                    return
                self._write_status()
                write_atomically(self.path / "lease.json", json.dumps(holder_now(self._token)))
            except OSError as error:  # a full disk must not end the run here; the save will say so
                log.warning("heartbeat: %s", error)

    def _write_status(self) -> None:
        with self._write_lock:
            write_atomically(self.path / "status.json", json.dumps({**self._status, "updated": time.time()}))


def open_run(path: Path, identity: dict, config_yaml: str, resume: str) -> RunFolder:
    """Rank 0: takes the folder for this attempt, or refuses it and touches nothing.

    Args:
        identity: `keys`, `identity_hash`, `pair_id` and `pixels` of this run.
        config_yaml: the resolved configuration, for RUN/config.yaml.
        resume: `auto`, or `never` to refuse a folder that holds a checkpoint.

    Raises:
        ConfigError: the folder belongs to a run of another identity (the keys are listed), or `resume` forbids it.
        UserError: another live process writes in the folder.
    """
    from repa_scale.checkpoint import list_checkpoints  # here: who only reads a folder needs no torch

    check_identity(path, identity)
    if resume == "never" and list_checkpoints(path / "checkpoints"):
        raise ConfigError(f"run.dir={path} holds a checkpoint and run.resume=never; choose another run.dir")
    holder, alive = look(path)
    if alive:
        raise UserError(
            f"run.dir={path} is in use: process {holder['pid']} on {holder['host']} writes there; "
            "wait for it, or stop it with: touch " + str(path / "stop")
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        take_lease(path, holder)
    except OSError as error:
        raise ConfigError(f"run.dir={path} cannot be written ({error.strerror}); choose another folder") from None
    (path / "stop").unlink(missing_ok=True)
    for name in ("checkpoints", "samples", "log"):
        (path / name).mkdir(exist_ok=True)
    identity = {**identity, **(stored_identity(path) or {})}  # its hashes stay as they are
    write_atomically(path / "identity.json", json.dumps(identity, indent=1))
    hashes = f"# identity_hash: {identity['identity_hash']}\n# pair_id: {identity['pair_id']}\n"
    write_atomically(path / "config.yaml", hashes + config_yaml)
    for name in ("metrics.jsonl", evaluations.FILE):
        _drop_torn_line(path / name)
    for left_over in (*path.glob("*.tmp-*"), *(path / "checkpoints").glob("*.tmp-*")):
        if left_over.is_dir():
            shutil.rmtree(left_over, ignore_errors=True)
        else:
            left_over.unlink(missing_ok=True)
    before = read_status(path)
    return RunFolder(path, int(before.get("attempt", 0)) + 1, before.get("state", ""))


def check_identity(path: Path, identity: dict) -> None:
    """Refuses a folder whose run has another identity, naming every key that differs."""
    from repa_scale.identity import differing

    stored = stored_identity(path)
    if stored is not None and (lines := differing(stored["keys"], identity["keys"])):
        raise ConfigError(
            f"run.dir={path} belongs to another run; these keys differ (there -> here): {'; '.join(lines)}; "
            "choose another run.dir, or the same settings"
        )


def stored_identity(path: Path) -> dict | None:
    """`keys`, `identity_hash` and `pair_id` of the run in a folder: of identity.json, else of its newest checkpoint.

    None: there is no run yet.

    Raises:
        UserError: identity.json is damaged, or cannot be read.
    """
    file = path / "identity.json"
    try:
        if file.is_file():
            return identity_in(json.loads(file.read_text()), "keys")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); choose another run.dir") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged, so this run cannot be compared with it; choose another run.dir") from None
    for manifest in sorted(path.glob("checkpoints/step_*[0-9]/manifest.json"), reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):  # a damaged one is dealt with when it is loaded
            return identity_in(json.loads(manifest.read_text()), "identity")
    return None


def identity_in(stored: dict, keys: str) -> dict:
    """What identity.json (`keys`) or a manifest (`identity`) says of the run.

    Raises:
        KeyError, TypeError, ValueError: it does not.
    """
    return {"keys": dict(stored[keys]), "identity_hash": stored["identity_hash"], "pair_id": stored["pair_id"]}


def pinned_pixels(path: Path) -> str | None:
    """The pixels that a run was trained on so far (data/decoder_choice.py); None: a new run, or nobody can tell.

    A run that was fetched from a store has them in its checkpoint alone. One of the first release has none: it cannot
    have started on a GPU, so they are Pillow's.
    """
    from repa_scale.checkpoint import MANIFEST, list_checkpoints

    checkpoints, found = list_checkpoints(path / "checkpoints"), None
    for file in (path / "identity.json", *(folder / MANIFEST for folder in reversed(checkpoints))):
        if checkpoints and file.is_file():
            with suppress(ValueError):  # a damaged manifest: the resume will say so
                if pixels := json.loads(file.read_text()).get("pixels"):
                    return pixels
                found = "pillow"
    return found


def require_disk_space(path: Path, needed: int) -> None:
    """Raises where the disk of `path` cannot hold the first checkpoint of `needed` bytes."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"run.dir={path}: a checkpoint takes {needed / 1e9:.3g} GB, but its disk has {free / 1e9:.3g} GB free; "
            "make room or choose another run.dir"
        )


def log_incident(path: Path, kind: str, **facts: object) -> None:
    """Appends one object to RUN/incidents.jsonl."""
    with (path / "incidents.jsonl").open("a") as file:
        file.write(_json_line({"time": time.time(), "kind": kind, **facts}))


def _json_line(facts: dict) -> str:
    return (
        redacted(json.dumps({k: str(v) if isinstance(v, float) and v - v != 0.0 else v for k, v in facts.items()}))
        + "\n"
    )


def log_to_folder(path: Path, rank: int) -> None:
    """Sends this rank's log to RUN/log/rank_N.log."""
    handler = logging.FileHandler(path / "log" / f"rank_{rank}.log")
    handler.setFormatter(RedactedFormatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # on a full disk: the console has it too
    log.addHandler(handler)


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint's folder lies in; None: it lies elsewhere. Nothing is read."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def training_set(path: Path) -> str:
    """`data.path` of RUN/config.yaml; empty where that is not known. A checkpoint alone does not say it.

    Raises:
        UserError: PyYAML is not installed.
    """
    yaml = require("yaml", "train")
    try:
        return str(yaml.safe_load((path / "config.yaml").read_text())["data"]["path"])
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return ""


def read_incidents(path: Path) -> list[dict]:
    """The objects of incidents.jsonl, in their order."""
    try:
        return [json.loads(line) for line in (path / "incidents.jsonl").read_text().splitlines()]
    except OSError:
        return []


def read_status(path: Path) -> dict:
    """RUN/status.json, or {} where there is none."""
    try:
        return json.loads((path / "status.json").read_text())
    except (OSError, ValueError):
        return {}


def read_metrics(path: Path) -> list[dict]:
    """The rows of metrics.jsonl that count, by step: of one step the highest attempt, of equal attempts the later."""
    rows: dict[int, dict] = {}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut off
            continue
        if row["step"] not in rows or row["attempt"] >= rows[row["step"]]["attempt"]:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _drop_torn_line(path: Path) -> None:
    """Cuts off the last line where a kill left it without its end."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
