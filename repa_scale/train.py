"""`repa-scale train`: one process of a run, alone or under `deepspeed`, `torchrun`, Slurm or Kubernetes."""

from __future__ import annotations

import json
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from repa_scale.errors import (
    INTERRUPTED,
    OUTCOME_VARIABLE,
    SWEEP_VARIABLE,
    ConfigError,
    ExitCode,
    UserError,
    summary,
)

log = logging.getLogger("repa_scale")


def main(argv: list[str] | None = None) -> int:
    """Parses the run's keys, trains, and returns the exit code that all ranks agree on."""
    argv = sys.argv[1:] if argv is None else argv
    code, error, together = _main(argv)
    _leave_outcome(code, error)
    if together or _alone():
        _leave()
    # Else the others may be in a collective, and leaving would wait for them: the process ends as it is (end_process).
    if code == INTERRUPTED:  # who pressed Ctrl-C twice waits for no save any more
        logging.shutdown()
        os._exit(code)
    return code


def _main(argv: list[str]) -> tuple[int, str, bool]:
    """The exit code, the error behind it on one line, and whether all ranks come to that code together."""
    from repa_scale.compose import SWEEP, compose_with_origin, print_requested
    from repa_scale.placement import adopt

    try:
        if any(word in SWEEP for word in argv):
            from repa_scale.sweep import main as sweep

            return int(sweep(argv)), "", True
        place = adopt()
        if print_requested(argv):
            return ExitCode.COMPLETED, "", True
        _log_to_console()
        with _telling(place):
            composed = compose_with_origin(argv)
        return int(run(*composed)), "", True
    except UserError as error:
        if int(os.environ.get("RANK", 0)) == 0:  # the others found the same, or have said theirs (roll_call.py)
            print(f"repa-scale: error: {error}", file=sys.stderr, flush=True)
        return ExitCode.BAD_INPUT, str(error), False
    except KeyboardInterrupt:
        return INTERRUPTED, "interrupted", False
    except Exception as error:
        log.exception("the run failed")
        return ExitCode.FAILED, summary(error), False


def _telling(place) -> AbstractContextManager[None]:
    """`roll_call.telling`, without torch where there is nobody to tell."""
    if place.world_size == 1:
        return nullcontext()
    from repa_scale.roll_call import telling

    return telling(place.rank, place.world_size)


def _leave_outcome(code: int, error: str) -> None:
    """Tells `repa-scale supervise` what launchers hide."""
    if folder := os.environ.get(OUTCOME_VARIABLE):
        path = Path(folder) / f"rank_{os.environ.get('RANK', 0)}.json"
        with suppress(OSError):
            path.write_text(json.dumps({"code": int(code), "error": error}))


def run(config, origin) -> ExitCode:
    """Checks all that can be checked before anything is loaded, then trains `config` (repa_scale.config.Config).

    Args:
        origin: which of its values were asked for (repa_scale.compose.Origin); a resumed run keeps its own others.
    """
    from repa_scale import flight_recorder, timeouts
    from repa_scale.compose import resolved_yaml
    from repa_scale.ranks import Ranks
    from repa_scale.run_folder import stored_identity

    ranks = Ranks.from_environment(config.train.device)
    with ranks.telling():
        given, stored = config, stored_identity(Path(config.run.dir))
        config, kept = _resumed(given, stored, origin)
        dataset, parameters, ds_config = check(config, ranks)
    flight_recorder.prepare(Path(config.run.dir) / "log")
    ranks.start(timeouts.collectives(config.health.hang_seconds))
    theirs = _on_main(ranks, lambda: _stored(given))
    if theirs != stored:  # the run is restored from its upload, or the file system showed this rank an older folder
        stored = theirs
        config, kept = _resumed(given, stored, origin)
        dataset, parameters, ds_config = check(config, ranks)
    identity = run_identity(config, dataset.fingerprint)
    if len(set(ranks.gather_objects(identity["identity_hash"]))) > 1:
        raise ConfigError("the ranks have different configurations or data; start them all with the same arguments")
    _verify(config, dataset, ranks)
    from repa_scale.data.decoder_choice import Decoders

    decoders = Decoders.found(config.data.decoder, ranks, dataset.manifest["recipe"], dataset.cached.pictures)
    folder, decoder = _join(config, ranks, identity, resolved_yaml(config), 16 * parameters + 2**20, decoders)
    identity |= stored or {}  # its hashes stay as they are
    from repa_scale.run_folder import log_to_folder

    log_to_folder(Path(config.run.dir), ranks.rank)
    decoder.tell()
    if kept:
        log.info("resuming with stored values instead of defaults: %s", "; ".join(kept))
    if config.train.deterministic:
        from repa_scale.deterministic import use_deterministic_algorithms

        use_deterministic_algorithms()
    from repa_scale.engine import import_deepspeed
    from repa_scale.files import write_atomically
    from repa_scale.redact import redacted
    from repa_scale.tracking import open_tracker
    from repa_scale.trainer import Trainer
    from repa_scale.watchdog import cause, report_failure

    import_deepspeed(ranks.device.type)
    tracker = None
    try:
        if ranks.is_main:
            tags = run_tags(config, ranks, identity, dataset)
            write_atomically(Path(config.run.dir) / "tags.json", redacted(json.dumps(tags, indent=1)))
            tracker = open_tracker(config, Path(config.run.dir), tags, dataset)
        return Trainer(config, ranks, dataset, folder, tracker, identity, ds_config, decoder.decoder).train()
    except BaseException as error:
        if folder is not None:
            folder.fail(cause(error))
        else:
            report_failure(ranks, summary(error))
        if tracker is not None:
            tracker.finish("failed")
        raise


def check(config, ranks):
    """What ends a rank before it joins the others. Returns the data set, the number of parameters and DeepSpeed's
    configuration.

    Raises:
        ConfigError: the configuration breaks a rule, or does not go with the data set or the initial weights.
    """
    from repa_scale.validation import validate

    validate(config, ranks.world_size)
    from repa_scale.alignment import check_kernel
    from repa_scale.cuda import check_precision
    from repa_scale.data.dataset import check_dataset, open_configured
    from repa_scale.engine import check_accelerator
    from repa_scale.tracking import check_installed

    check_installed(config)
    check_accelerator(ranks.device.type)
    if ranks.device.type == "cuda":
        check_precision(config.train.precision)
    check_kernel(config, ranks.device)
    dataset = open_configured(config.data)
    check_dataset(dataset, config.model.num_classes, config.data.image_size, config.train.global_batch)
    dataset.cached = stored_features_of(config, dataset)
    from repa_scale.deepspeed_config import deepspeed_dict
    from repa_scale.objective import count_parameters
    from repa_scale.state import check_initial

    check_initial(config)
    parameters = count_parameters(config)
    return dataset, parameters, deepspeed_dict(config, ranks.world_size, parameters, ranks.device.type)


def _resumed(config, stored: dict | None, origin) -> tuple:
    """The configuration with the stored values of a resumed run, and a line for each key taken from them."""
    from repa_scale.stored_values import with_stored_values

    return with_stored_values(config, stored["keys"], origin) if stored else (config, [])


def _stored(config) -> dict | None:
    """The identity of the run that goes on: in its folder, or where an earlier machine uploaded its checkpoints."""
    import tempfile

    from repa_scale.checkpoint import list_checkpoints
    from repa_scale.run_folder import stored_identity
    from repa_scale.uploads import KEY

    path, url = Path(config.run.dir), config.checkpoint.upload
    stored = stored_identity(path)
    if stored is None and url and config.run.resume != "never" and not list_checkpoints(path / "checkpoints"):
        from repa_scale import checkpoint_store

        with tempfile.TemporaryDirectory() as scratch, checkpoint_store.open_store(Path(scratch), url, KEY) as store:
            stored = checkpoint_store.stored_identity(store)
    return stored


def _on_main(ranks, ask):
    """What rank 0 gets from `ask`, on every rank; where it raises a UserError, every rank raises the same."""
    value, refusal = None, None
    if ranks.is_main:
        try:
            value = ask()
        except UserError as error:
            refusal = error
    value, refusal = ranks.broadcast_object((value, refusal))
    if refusal is not None:
        raise refusal
    return value


def stored_features_of(config, dataset):
    """What `data.source` reads of the set, which must be of the run's own networks (data/features.py)."""
    from repa_scale.data.features import choose_features
    from repa_scale.sizes import latent_grid, token_grid

    channels, *plane = latent_grid(config.data.image_size, config.latents.name)
    rows, columns = token_grid(config.data.image_size, config.latents.name, config.model.name)
    terms = {} if config.method == "baseline" else config.alignment
    if config.data.flip and config.data.source != "image" and not dataset.manifest["recipe"].get("flip"):
        raise ConfigError(
            f"data.flip=true, but the features in {dataset.path} are not stored mirrored; "
            "prepare the set with --flip, or use data.flip=false"
        )
    return choose_features(
        dataset.manifest,
        config.data.source,
        (config.latents.name, config.latents.weights),
        [(channels, *plane), (2 * channels, *plane)],
        dict.fromkeys((term.encoder, term.weights) for term in terms.values()),
        rows * columns,
    )


def _verify(config, dataset, ranks) -> None:
    """The ranks of a node share the checking of the shards' hashes. What one finds, all leave out, or all refuse."""
    from repa_scale.data.bad import Quarantine

    bad = {}
    if not dataset.verified:
        bad = dataset.verify(ranks.local_rank, ranks.local_size)
    for found in ranks.gather_objects(bad):
        dataset.reader.bad |= found
    shards = {dataset.reader.shards[number].basename: why for number, why in sorted(dataset.reader.bad.items())}
    samples = sum(dataset.reader.shards[number].samples for number in dataset.reader.bad)
    Quarantine(dataset.count, config.data.max_bad).refuse(shards, samples)


def run_identity(config, data_fingerprint: str) -> dict:
    """`keys`, `identity_hash` and `pair_id` of a run (identity.py)."""
    from repa_scale.identity import identity_hash, identity_keys, pair_id

    keys = identity_keys(config, data_fingerprint)
    return {"keys": keys, "identity_hash": identity_hash(keys), "pair_id": pair_id(keys)}


def run_tags(config, ranks, identity: dict, dataset) -> dict[str, str]:
    """What MLflow and RUN/tags.json show of a run besides its parameters."""
    from repa_scale.deepspeed_config import zero_stage
    from repa_scale.provenance import device_name, git_commit, versions

    terms = {} if config.method == "baseline" else config.alignment
    return {
        "method": config.method,
        "model": config.model.name,
        "encoder": ",".join(term.encoder for term in terms.values()) or "none",
        "alignment_depth": ",".join(str(term.depth) for term in terms.values()) or "none",
        "alignment_weight": ",".join(str(term.weight) for term in terms.values()) or "none",
        "pair_id": identity["pair_id"],
        "identity_hash": identity["identity_hash"],
        "data_fingerprint": dataset.fingerprint,
        "git_commit": git_commit(),
        "world_size": str(ranks.world_size),
        "device": device_name(ranks.device),
        "precision": config.train.precision,
        "seed": str(config.seed),
        "zero_stage": str(zero_stage(config)),
        "run_dir": str(Path(config.run.dir).absolute()),
        "command": " ".join(["repa-scale train", *sys.argv[1:]]),
        "versions": versions(),
        **({"sweep": os.environ[SWEEP_VARIABLE]} if SWEEP_VARIABLE in os.environ else {}),
    }


def _join(config, ranks, identity: dict, yaml: str, checkpoint_bytes: int, decoders):
    """Rank 0 opens the run folder and settles the decoder; where either is refused, every rank raises the same error.

    identity: the pixels that the decoder gives are added to it.
    checkpoint_bytes: master weights, two moments and EMA in fp32 (16 bytes a parameter), and a little.
    """
    from repa_scale.run_folder import check_identity, open_run, pinned_pixels, require_disk_space

    folder, decoder, refusal = None, None, None
    if ranks.is_main:
        try:
            path = Path(config.run.dir)
            require_disk_space(path, checkpoint_bytes)
            if config.checkpoint.upload and config.run.resume != "never":
                _restore(path, config.checkpoint.upload, identity)
            check_identity(path, identity)
            decoder = decoders.choose(pinned_pixels(path))
            folder = open_run(path, _with_pixels(identity, decoder), yaml, config.run.resume)
            if decoder.replaced:
                folder.incident("decoder_changed", decoder=decoder.decoder, before=decoder.replaced, now=decoder.pixels)
            folder.start()
        except UserError as error:
            refusal = error
    refusal, decoder = ranks.broadcast_object((refusal, decoder))
    if refusal is not None:
        raise refusal
    _with_pixels(identity, decoder)
    return folder, decoder


def _with_pixels(identity: dict, decoder) -> dict:
    """Pins the pixels of the run beside its identity, outside the hash."""
    if decoder.pixels:
        identity["pixels"] = decoder.pixels
    return identity


def _restore(path: Path, url: str, identity: dict) -> None:
    """Into a run folder without a checkpoint: the newest that an earlier machine uploaded, if any."""
    from repa_scale.checkpoint import list_checkpoints
    from repa_scale.checkpoint_store import open_store, restore_newest
    from repa_scale.lease import live_holder
    from repa_scale.run_folder import check_identity
    from repa_scale.uploads import KEY

    check_identity(path, identity)
    if list_checkpoints(path / "checkpoints") or live_holder(path):
        return
    try:
        with open_store(path, url, KEY) as store:
            restore_newest(path, store, identity["keys"])
    except OSError as error:
        raise UserError(f"run.dir={path}: the checkpoint of {KEY}={url} cannot be written there ({error})") from None


def _log_to_console() -> None:
    """Rank 0's log to stderr."""
    from repa_scale.redact import RedactedFormatter

    log.setLevel(logging.INFO)
    if int(os.environ.get("RANK", 0)) == 0 and not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactedFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        log.addHandler(handler)
    log.propagate = False


def _alone() -> bool:
    """Whether no other process is in a process group with this one."""
    if "torch" not in sys.modules:
        return True
    import torch.distributed as dist

    return not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1


def _leave() -> None:
    """Leaves the process group; without it some runs abort at exit."""
    if "torch" in sys.modules:
        from repa_scale.ranks import leave_group

        leave_group()


if __name__ == "__main__":
    from repa_scale.processes import end_process

    end_process(main())
