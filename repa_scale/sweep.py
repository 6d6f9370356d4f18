"""`repa-scale train -m KEY=A,B ...`: one run for each combination of values, one after the other; or a file of their
keys for a Slurm job array (launchers/slurm/sweep.sbatch).

Each run is a process and a folder of its own, as if its keys were typed: what a run does is train.py's business.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from repa_scale.compose import SWEEP, compose
from repa_scale.config import Config
from repa_scale.errors import SWEEP_VARIABLE, ConfigError, ExitCode
from repa_scale.identity import identity_keys
from repa_scale.run_folder import read_status

KEEP_GOING, WRITE = "--keep-going", "--write"
PLACE = re.compile(r"\{([\w./]+)\}")  # a key in run.dir
EXAMPLE = "repa-scale train -m experiment=demo_repa method=repa,baseline seed=0,1"
MOST = 1000  # runs


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        words: its command line.
        chosen: the swept keys and their values, as given.
    """

    words: tuple[str, ...]
    chosen: tuple[tuple[str, str], ...]
    config: Config

    @property
    def folder(self) -> str:
        return self.config.run.dir


def main(argv: list[str]) -> int:
    """Runs a sweep, or writes its file of keys. The exit code is that of the first run that did not complete.

    Raises:
        ConfigError: before anything is started, where one of the runs cannot be composed, or two share a folder.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            f"-m starts one run after the other itself and cannot be started by torchrun or deepspeed; write "
            f"the runs' keys with {WRITE} FILE and launch each"
        )
    words, file, keep_going = _options(argv)
    variants, same = expand(words)
    for line in same:
        print(line)
    if file:
        _write(Path(file), variants)
        print(f"{len(variants)} runs: sbatch --array=1-{len(variants)} launchers/slurm/sweep.sbatch {file}")
        return ExitCode.COMPLETED
    return _run_all(variants, name_of(words), keep_going)


def expand(words: list[str]) -> tuple[list[Variant], list[str]]:
    """Every combination of the values of the keys that have several, the last key changing fastest.

    Args:
        words: `key=value`, where a value may be a list `a,b,c`. A comma inside brackets or quotes parts nothing.

    Returns:
        The runs, and a line for each that is left out because it would be another one again: a baseline has no
        alignment weight.

    Raises:
        ConfigError: nothing to sweep, a mistake in a key or value, too many runs, or two in one folder.
    """
    choices = [_alternatives(word) for word in words]
    swept = [word.partition("=")[0] for word, several in zip(words, choices, strict=True) if len(several) > 1]
    if not swept:
        raise ConfigError(f"-m needs a key with several values, such as seed=0,1,2; example: {EXAMPLE}")
    if twice := [key for key in swept if [word.partition("=")[0] for word in words].count(key) > 1]:
        raise ConfigError(f"{twice[0]} is given twice in a sweep; give its values once, as {twice[0]}=A,B")
    count = 1
    for several in choices:
        count *= len(several)
    if count > MOST:
        raise ConfigError(f"this sweep has {count} runs; at most {MOST} are taken, name fewer values")
    variants, lines, known = [], [], {}
    for combination in itertools.product(*choices):
        chosen = tuple(tuple(word.split("=", 1)) for word in combination if word.partition("=")[0] in swept)
        variant = _variant(list(combination), chosen)
        first = known.setdefault(_effect(variant), variant)
        if first is variant:
            variants.append(variant)
        else:
            lines.append(f"left out, the same run as {first.folder}: {_text(chosen)}")
    folders = [str(Path(variant.folder)) for variant in variants]
    if shared := [folder for folder in folders if folders.count(folder) > 1]:
        raise ConfigError(
            f"run.dir={shared[0]} is the folder of {folders.count(shared[0])} runs of this sweep; name every swept key "
            f"in it, such as run.dir='runs/{'-'.join('{' + key + '}' for key in swept)}', or leave the braces out"
        )
    return variants, lines


def name_of(words: list[str]) -> str:
    """What the runs of a sweep have in common in MLflow: the same for the same command, so that it can be repeated."""
    given = os.environ.get(SWEEP_VARIABLE)
    return given or "sweep-" + hashlib.sha256("\0".join(words).encode()).hexdigest()[:10]


def _variant(words: list[str], chosen: tuple[tuple[str, str], ...]) -> Variant:
    """The run of one combination, with its folder: run.dir with the keys in braces filled in, or a folder below it."""
    rest = [word for word in words if not word.startswith("run.dir=")]
    given = [word.partition("=")[2] for word in words if word.startswith("run.dir=")]
    config = compose(rest)
    values = dict(chosen)
    name = "_".join(f"{key.split('.')[-1]}-{_plain(value)}" for key, value in chosen)
    template = given[-1] if given else f"runs/{config.run.name}-sweep"
    if PLACE.search(template):
        if unknown := [key for key in PLACE.findall(template) if key not in values]:
            raise ConfigError(f"run.dir={template}: {unknown[0]} is not swept; swept are {', '.join(values)}")
        folder = PLACE.sub(lambda match: _plain(values[match[1]]), template)
    else:
        folder = f"{template}/{name}"
    config.run.dir = folder
    return Variant((*rest, f"run.dir={folder}"), chosen, config)


def _plain(value: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "-", value.strip("\"'[]{}()")).strip("-") or "empty"


def _effect(variant: Variant) -> str:
    """Equal for two runs of which one need not be made: the same identity, and other keys of alignment terms alone.

    A sweep over a free key, such as the micro batch, is wanted, although its runs have one identity.
    """
    others = [pair for pair in variant.chosen if not pair[0].startswith("alignment.")]
    return json.dumps([identity_keys(variant.config, ""), others], sort_keys=True)


def _alternatives(word: str) -> list[str]:
    """`key=a,b` -> `key=a`, `key=b`; what is no list, and run.dir, stays as it is."""
    key, equals, value = word.partition("=")
    if not equals or key == "run.dir" or key.startswith("-"):
        return [word]
    parts = list(_split(value))
    if len(parts) > 1 and not all(part.strip() for part in parts):
        raise ConfigError(f"{word}: one of its values is empty; write {key}=A,B without a comma at the end")
    if len(set(parts)) < len(parts):
        raise ConfigError(f"{word} names a value twice; name each once")
    return [f"{key}={part}" for part in parts]


def _split(value: str) -> Iterator[str]:
    """At the commas outside brackets and quotes."""
    depth, quote, part = 0, "", ""
    for letter in value:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in ")}]":
            depth -= 1
        elif letter == "," and depth == 0:
            yield part
            part = ""
            continue
        part += letter
    yield part


def _options(argv: list[str]) -> tuple[list[str], str, bool]:
    """The keys, the file of --write, and whether to keep going."""
    words, file, left = [], "", [word for word in argv if word not in SWEEP]
    while left:
        word = left.pop(0)
        if word == WRITE and not left:
            raise ConfigError(f"{WRITE} needs the name of a file")
        if word == WRITE:
            file = left.pop(0)
        elif word in ("--config", "--cfg", "-c", "--help", "-h"):
            raise ConfigError(f"{word} has no meaning for a sweep; give experiment=NAME and keys, without -m")
        elif word != KEEP_GOING:
            words.append(word)
    return words, file, KEEP_GOING in argv


def _write(file: Path, variants: list[Variant]) -> None:
    """A line of keys for each run, quoted as a shell would want it: what launchers/slurm/sweep.sbatch reads."""
    try:
        file.write_text("".join(shlex.join(variant.words) + "\n" for variant in variants))
    except OSError as error:
        raise ConfigError(f"{WRITE} {file} cannot be written ({error.strerror}); name another file") from None


def _run_all(variants: list[Variant], name: str, keep_going: bool) -> int:
    """One run after the other; a wish to stop goes to the one that runs, and no other is started."""
    codes: list[int] = []
    with _Stop() as stop:
        for number, variant in enumerate(variants, start=1):
            if stop.asked or (codes and codes[-1] and not keep_going):
                break
            print(f"run {number} of {len(variants)}: {_text(variant.chosen)} in {variant.folder}", flush=True)
            environment = {**os.environ, SWEEP_VARIABLE: name}
            command = [sys.executable, "-m", "repa_scale", "train", *variant.words]
            codes.append(stop.wait(subprocess.Popen(command, env=environment)))
    print(_summary(variants, codes, name))
    if stop.asked and len(codes) < len(variants) and not any(codes):
        return ExitCode.PREEMPTED
    return next((code for code in codes if code), ExitCode.COMPLETED)


class _Stop:
    """SIGTERM and SIGINT to the sweep are the running run's: it saves and ends, and the sweep with it."""

    def __init__(self) -> None:
        self.asked = False
        self._child: subprocess.Popen | None = None

    def __enter__(self) -> _Stop:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._before = {number: signal.signal(number, self._hear) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _frame: object) -> None:
        self.asked = True
        if self._child is not None and number == signal.SIGTERM:  # Ctrl-C reaches it from the terminal
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()

    def wait(self, child: subprocess.Popen) -> int:
        """Its exit code; 128 + N where signal N ended it, as a shell says."""
        self._child = child
        if self.asked:  # in the moment in which it was started
            child.terminate()
        code = child.wait()
        self._child = None
        return code if code >= 0 else 128 - code


def _summary(variants: list[Variant], codes: list[int], name: str) -> str:
    lines = [f"sweep {name}: {codes.count(0)} of {len(variants)} runs completed"]
    for variant, code in itertools.zip_longest(variants, codes):
        if code is None:
            lines.append(f"  not started  {_text(variant.chosen)}")
            continue
        state = read_status(Path(variant.folder)).get("state", "not begun")
        with contextlib.suppress(OSError, ValueError, KeyError):
            state += ", pair " + json.loads((Path(variant.folder) / "identity.json").read_text())["pair_id"]
        lines.append(f"  code {code:<8}{_text(variant.chosen)}: {variant.folder} ({state})")
    return "\n".join(lines)


def _text(chosen: tuple[tuple[str, str], ...]) -> str:
    return " ".join(f"{key}={value}" for key, value in chosen)
