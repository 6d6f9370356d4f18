"""Checkpoints in an object store: copies of a run's newest ones, with the small files that the run goes on from.

    URL/latest                       name of the newest that counts
    URL/step_N/rank_...safetensors   as in RUN/checkpoints
    URL/step_N/run/metrics.jsonl     and what else of the run folder is in `RUN_FILES`
    URL/step_N/manifest.json         written last: without it, the checkpoint is not there

Every file is read back and its checksum taken before the manifest is written.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from repa_scale.checkpoint import MANIFEST, CheckpointReader, list_checkpoints, publish
from repa_scale.checksums import algorithm_of, checksum_file
from repa_scale.errors import ConfigError, DataError, UserError
from repa_scale.files import link, sync_folder, write_atomically
from repa_scale.identity import differing
from repa_scale.object_store import ObjectStore
from repa_scale.run_folder import identity_in

LATEST = "latest"
WORK = "store.tmp-{pid}"  # in RUN/checkpoints, whose left-overs the next start removes
RUN_FILES = ("metrics.jsonl", "incidents.jsonl", "quarantine.jsonl", "left_out.json", "mlflow.json", "status.json")

log = logging.getLogger("repa_scale")


@contextmanager
def open_store(run: Path, url: str, key: str) -> Iterator[ObjectStore]:
    """The store at `url`, with a folder for its work beside the checkpoints, on their file system.

    Args:
        key: where the user named the URL.

    Raises:
        UserError: the store is of no known kind, or does not answer.
    """
    work = run / "checkpoints" / WORK.format(pid=os.getpid())
    try:
        yield ObjectStore(url, work, key)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def upload_newest(run: Path, store: ObjectStore) -> str | None:
    """Copies a run's newest checkpoint, unless the store has it; returns its name, None: there is none.

    Raises:
        DataError: a file is broken, here or after its way to the store; what the store had still counts.
        UserError: the store does not answer.
    """
    newest = _newest_readable(run)
    if newest is None:
        return None
    name = newest.folder.name
    if store.read(f"{name}/{MANIFEST}") != (newest.folder / MANIFEST).read_bytes():
        _upload(run, newest, store)
    _put_text(store, LATEST, name + "\n")
    return name


def restore_newest(run: Path, store: ObjectStore, identity: dict | None = None) -> str | None:
    """Fetches the newest whole checkpoint into a run folder that has none; returns its name, None: the store has none.

    Args:
        identity: `keys` of the run that goes on from it; None: not compared.

    Raises:
        ConfigError: the checkpoints there belong to another run; the keys are named.
        UserError: there are checkpoints, and none is whole; or the store does not answer.
    """
    folder = run / "checkpoints"
    if list_checkpoints(folder):
        return None
    names = _names_by_age(store)
    why = ""
    for name in names:
        aside = folder / f"{name}.tmp-restore-{os.getpid()}"
        try:
            reader = _download(store, name, aside)
        except DataError as error:
            why = why or str(error)
            log.warning("%s/%s is not whole (%s); trying an older one", store.url, name, error)
            shutil.rmtree(aside, ignore_errors=True)
            continue
        if identity is not None and (lines := differing(reader.manifest["identity"], identity)):
            shutil.rmtree(aside, ignore_errors=True)
            raise ConfigError(
                f"{store.key}={store.url} belongs to another run; these keys differ (there -> here): "
                f"{'; '.join(lines)}; choose another URL, or the same settings"
            )
        _take_run_files(store, name, run)
        publish(aside, folder / name)
        log.info("fetched %s from %s", name, store.url)
        return name
    if names:
        raise UserError(
            f"no checkpoint under {store.key}={store.url} is whole ({why}); choose another URL to begin anew"
        )
    return None


def stored_identity(store: ObjectStore) -> dict | None:
    """`keys`, `identity_hash` and `pair_id` of the run whose checkpoints the store has; None: it has none.

    Raises:
        UserError: the store does not answer.
    """
    for name in _names_by_age(store):
        with suppress(ValueError, KeyError, TypeError):  # restore_newest tells what is damaged
            return identity_in(json.loads(store.read(f"{name}/{MANIFEST}") or b""), "identity")
    return None


def _newest_readable(run: Path) -> CheckpointReader | None:
    for path in reversed(list_checkpoints(run / "checkpoints")):
        try:
            return CheckpointReader(path)
        except DataError as error:
            log.warning("not uploaded: %s", error)
    return None


def _upload(run: Path, reader: CheckpointReader, store: ObjectStore) -> None:
    name = reader.folder.name
    back = store.scratch / "read_back"
    for file, entry in reader.manifest["files"].items():
        store.put(reader.folder / file, f"{name}/{file}")
        store.get(f"{name}/{file}", back)
        found = checksum_file(back, algorithm_of(entry["checksum"]))
        back.unlink()
        if found != entry["checksum"]:
            raise DataError(f"{store.url}/{name}/{file} does not have the checksum of the manifest after its upload")
    for file in RUN_FILES:
        if (run / file).is_file():
            store.put(run / file, f"{name}/run/{file}")
    store.put(reader.folder / MANIFEST, f"{name}/{MANIFEST}")


def _names_by_age(store: ObjectStore) -> list[str]:
    """The checkpoints that count, newest first: those up to `latest`, since a run may have been rolled back."""
    ends = f"/{MANIFEST}"
    names = sorted(name.removesuffix(ends) for name in store.names("step_") if name.endswith(ends))
    latest = (store.read(LATEST) or b"").decode(errors="replace").strip()
    return [name for name in reversed(names) if not latest or name <= latest]


def _download(store: ObjectStore, name: str, folder: Path) -> CheckpointReader:
    """One checkpoint in a local folder, verified.

    Raises:
        DataError: it is damaged.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    store.get(f"{name}/{MANIFEST}", folder / MANIFEST)
    reader = CheckpointReader(folder)
    there = set(store.names(f"{name}/"))
    for file in reader.manifest["files"]:
        if Path(file).name != file or f"{name}/{file}" not in there:
            raise DataError(f"{file} is missing")
        store.get(f"{name}/{file}", folder / file)
    if problems := reader.problems():
        raise DataError(problems[0])
    sync_folder(folder)
    return CheckpointReader(folder)


def _take_run_files(store: ObjectStore, name: str, run: Path) -> None:
    """The files of the run folder that are not there yet."""
    there = set(store.names(f"{name}/run/"))
    for file in RUN_FILES:
        if f"{name}/run/{file}" in there and not (run / file).exists():
            aside = store.scratch / file
            store.get(f"{name}/run/{file}", aside)
            link(aside, run / file)
            aside.unlink()


def _put_text(store: ObjectStore, name: str, text: str) -> None:
    path = store.scratch / f"{name}.text"
    write_atomically(path, text)
    store.put(path, name)
    path.unlink()
