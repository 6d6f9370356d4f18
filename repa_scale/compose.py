"""From the words of a command line to a complete `Config`: presets, frozen files, overrides. Writes nothing.

Hydra composes the preset; overrides are applied here, one by one, so that each mistake is answered in one line that
names the key. A frozen file (`--config RUN/config.yaml`) needs no Hydra.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import types
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from repa_scale import config as schema
from repa_scale.config import Config, TermConfig, from_dict
from repa_scale.errors import ConfigError, did_you_mean, require
from repa_scale.sizes import backbone

EXAMPLE = "repa-scale train experiment=demo_repa run.dir=runs/first"
# Flags of `deepspeed` and `torchrun` that carry a value; those of Hydra that have no meaning here are refused.
RANK_FLAGS = ("--local_rank", "--local-rank")
DEEPSPEED_FLAGS = ("--deepspeed_config", "--deepspeed-config")
OPTIONS = ("--help", "-h", "--config", "--cfg", *RANK_FLAGS, *DEEPSPEED_FLAGS)
SWEEP = ("-m", "--multirun")  # sweep.py
# A key among the alignment terms that is no term. `Config.alignment` holds terms alone, so its field lies beside them.
KERNEL, KERNEL_FIELD = "alignment.kernel", "alignment_kernel"
# First lines of files: RUN/config.yaml (run_folder.py), and what `repa-scale launch` brings to the nodes.
STORED_MARK, ORIGIN_MARK = "# identity_hash: ", "# origin: "


@dataclasses.dataclass
class Words:
    """A command line, sorted.

    Attributes:
        preset: of `experiment=NAME`; empty without one.
        file: of `--config FILE`; empty without one.
        overrides: (key, text of the value) in the order given; the value is None for `~key`.
        show: `help`, `cfg` or empty.
    """

    preset: str = ""
    file: str = ""
    overrides: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    show: str = ""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a configuration's values come from; what is in neither set is a default.

    Attributes:
        asked: keys of the command line and of `--config FILE`. `alignment.NAME` is there where a term is mentioned at
            all, and `alignment` where a file names all terms.
        preset: keys that `experiment=NAME` sets.
    """

    asked: frozenset[str] = frozenset()
    preset: frozenset[str] = frozenset()

    def asks_for(self, key: str, stored: dict[str, Any]) -> bool:
        """Whether a key's value stands against that of a stored run: the user gave it, or the preset sets a key that
        the run knows."""
        return key in self.asked or (key in self.preset and key in stored)

    def names_terms(self, name: str) -> bool:
        """Whether the user decided that there is, or is not, an alignment term of this name."""
        return "alignment" in self.asked or f"alignment.{name}" in self.asked

    def as_line(self) -> str:
        """A comment for the top of a frozen file."""
        return f"{ORIGIN_MARK}{json.dumps({'asked': sorted(self.asked), 'preset': sorted(self.preset)})}\n"


def compose(argv: list[str]) -> Config:
    """The complete configuration that `argv` asks for.

    Args:
        argv: `experiment=NAME` or `--config FILE`, then `key=value`; of a key given twice the last counts. What
            launchers add (`--local_rank`, `--deepspeed`, `--deepspeed_config FILE`) is read or dropped.

    Raises:
        ConfigError: an unknown key or preset, a value of the wrong type, an unreadable file.
    """
    return compose_with_origin(argv)[0]


def compose_with_origin(argv: list[str]) -> tuple[Config, Origin]:
    """`compose`, and which of the values were asked for."""
    words = _sort(argv)
    if words.file and words.preset:
        raise ConfigError(
            f"experiment={words.preset} and --config {words.file} are both whole configurations; give one of them"
        )
    tree, origin = _frozen(words.file) if words.file else _preset(words.preset)
    asked = set(origin.asked)
    for key, text in words.overrides:
        if text is None:
            _remove(tree, key)
            asked.add(key)
        else:
            _assign(tree, key, _value(key, text), asked)
    return complete(_to_config(tree), words.preset), Origin(frozenset(asked), origin.preset)


def complete(config: Config, preset: str = "") -> Config:
    """Fills in what follows from other keys: `run.name`, `run.dir` and `model.qk_norm`."""
    size, _ = backbone(config.model.name)
    if config.model.qk_norm is None:
        config.model.qk_norm = size.qk_norm
    if not config.run.name:
        config.run.name = preset or config.model.name.lower().replace("/", "-")
    if not config.run.dir:
        config.run.dir = f"runs/{config.run.name}-{config.method}-seed{config.seed}"
    return config


def resolved_yaml(config: Config, origin: Origin | None = None) -> str:
    """The configuration as YAML; `compose(["--config", file])` of it gives an equal `Config`, and `origin` if given.

    A machine without OmegaConf, on which a program made the configuration, gets it as JSON, which is YAML too.
    """
    head = origin.as_line() if origin else ""
    values = dataclasses.asdict(config)
    values["alignment"] = {"kernel": values.pop(KERNEL_FIELD), **values["alignment"]}
    if importlib.util.find_spec("omegaconf") is None:
        return head + json.dumps(values, indent=1) + "\n"
    omegaconf = require("omegaconf", "train")
    return head + omegaconf.OmegaConf.to_yaml(omegaconf.OmegaConf.create(values))


def print_requested(argv: list[str]) -> bool:
    """Answers `--help` and `--cfg job` on stdout. Returns whether one of them was asked for.

    Raises:
        ConfigError: as `compose`, for `--cfg job`.
    """
    asked = _sort(argv).show
    if asked == "help":
        print(help_text())
    elif asked == "cfg":
        print(resolved_yaml(compose(argv)), end="")
    return bool(asked)


def presets() -> list[str]:
    """Names for `experiment=NAME`."""
    folder = resources.files("repa_scale.configs") / "experiment"
    return sorted(file.name[: -len(".yaml")] for file in folder.iterdir() if file.name.endswith(".yaml"))


def help_text() -> str:
    """The help of `repa-scale train`."""
    lines = [
        "usage: repa-scale train [experiment=PRESET | --config FILE] [key=value ...]",
        "       repa-scale train -m [experiment=PRESET] [key=A,B ...] [--keep-going] [--write FILE]",
        "",
        "Trains one run: alone, or one process of many under deepspeed, torchrun, Slurm or Kubernetes.",
        "Starting a run whose folder holds a checkpoint goes on from it.",
        "",
        f"example: {EXAMPLE}",
        "         deepspeed --num_gpus 8 --module repa_scale.train experiment=repa_sit_xl data.path=FOLDER",
        "",
        "  -m              a sweep: one run for each combination of the values of keys that have several",
        "  --keep-going    of a sweep: go on with the next run when one fails",
        "  --write FILE    of a sweep: write the keys of its runs, a line each, and start none",
        "  --config FILE   start from a frozen configuration, such as RUN/config.yaml",
        "  --cfg job       print the resolved configuration and do nothing else",
        "  --help          this text",
        "",
        f"presets: {', '.join(presets())}",
        "",
        "keys (docs/configuration.md explains each):",
    ]
    groups: dict[str, list[str]] = {}
    for key in known_keys():
        group, _, rest = key.rpartition(".")
        groups.setdefault(group, []).append(rest)
    for group, names in groups.items():
        lines.append(f"  {group + '.' if group else ''}{{{', '.join(names)}}}" if group else f"  {', '.join(names)}")
    return "\n".join(lines)


def known_keys(term: str = "NAME") -> dict[str, Any]:
    """Every key and its type. An alignment term's stand under `alignment.{term}.`"""
    return dict(_known_keys(term))


@functools.cache
def _known_keys(term: str) -> dict[str, Any]:
    return dict(_fields(Config, "", term))


def _fields(cls: type, prefix: str, term: str) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(cls, vars(schema)).items():
        if dataclasses.is_dataclass(hint):
            yield from _fields(hint, f"{prefix}{name}.", term)
        elif typing.get_origin(hint) is dict:
            yield from _fields(TermConfig, f"{prefix}{name}.{term}.", term)
        else:
            yield KERNEL if name == KERNEL_FIELD else f"{prefix}{name}", hint


# The command line.


def _sort(argv: list[str]) -> Words:
    words = Words()
    left = list(argv)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")

        def argument(flag: str = flag, equals: str = equals, value: str = value) -> str:
            if equals:
                return value
            if not left:
                raise ConfigError(f"{flag} needs a value; see repa-scale train --help")
            return left.pop(0)

        if word in ("--help", "-h"):
            words.show = words.show or "help"
        elif flag in RANK_FLAGS:
            argument()
        elif word == "--deepspeed":
            pass
        elif flag in DEEPSPEED_FLAGS:
            words.overrides.append(("deepspeed.config", argument()))
        elif flag == "--config":
            words.file = argument()
        elif flag in ("--cfg", "-c"):
            if (what := argument()) != "job":
                raise ConfigError(f"{flag} {what}: only `--cfg job` is known; it prints the resolved configuration")
            words.show = words.show or "cfg"
        elif word.startswith("-"):
            raise ConfigError(f"{word} is not an option of repa-scale train{did_you_mean(flag, OPTIONS)}")
        elif word.startswith("~"):
            words.overrides.append((flag[1:], None))
        elif not equals:
            raise ConfigError(f"{word!r} is not of the form key=value{_hint(word)}")
        elif flag == "experiment":
            words.preset = value
        else:
            words.overrides.append((flag.lstrip("+"), value))
    return words


def _hint(word: str) -> str:
    return f"; use experiment={word}" if word in presets() else "; for example train.steps=1000"


def _value(key: str, text: str) -> Any:
    """The value that YAML reads in `text`; 1e-4 is a number, and an empty text stays a text."""
    omegaconf = require("omegaconf", "train")
    try:
        (value,) = omegaconf.OmegaConf.to_container(omegaconf.OmegaConf.from_dotlist([f"value={text}"])).values()
    except Exception as error:
        raise ConfigError(f"{key}={text}: not a YAML value ({_first_line(error)}); put it in quotes") from None
    is_text = known_keys().get(key) is str  # no term's text looks like a number
    return text if text == "" or (is_text and isinstance(value, (bool, int, float))) else value


# The tree of values (an OmegaConf of `Config`, which checks the types).


def _preset(name: str) -> tuple[Any, Origin]:
    hydra = require("hydra", "train")
    from omegaconf import OmegaConf

    if name and name not in presets():
        raise ConfigError(f"experiment={name} is not a preset{did_you_mean(name, presets())}")
    with hydra.initialize_config_module("repa_scale.configs", version_base="1.3"):
        values = OmegaConf.to_container(hydra.compose("config", [f"experiment={name}"] if name else []))
    tree, given = OmegaConf.structured(Config()), set()
    for key, value in values.items():
        _assign(tree, str(key), value, given)
    return tree, Origin(preset=frozenset(given))


def _frozen(file: str) -> tuple[Any, Origin]:
    from omegaconf import OmegaConf

    try:
        text = Path(file).read_text(encoding="utf-8")
        values = OmegaConf.to_container(OmegaConf.create(text))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {file} cannot be read: {_first_line(error)}; name a YAML file") from None
    except Exception as error:
        raise ConfigError(f"--config {file} is not YAML: {_first_line(error)}; mend or replace it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {file} does not hold keys and values; name a file such as RUN/config.yaml")
    stored = text.startswith(STORED_MARK)  # by a run, maybe before some of today's keys existed
    start = from_dict({}) if stored else Config()
    given = set()
    if isinstance(terms := values.get("alignment"), dict):
        start.alignment = {}  # the file names all its terms
        if stored:
            start.alignment = {str(name): from_dict({}, TermConfig) for name in terms if str(name) != "kernel"}
        given.add("alignment")
    tree = OmegaConf.structured(start)
    try:
        for key, value in values.items():
            _assign(tree, str(key), value, given)
    except ConfigError as error:
        raise ConfigError(f"--config {file}: {error}") from None
    return tree, _read_origin(file, text) or Origin(frozenset(given))


def _read_origin(file: str, text: str) -> Origin | None:
    """What `Origin.as_line` wrote; None where the file does not begin with it."""
    if not text.startswith(ORIGIN_MARK):
        return None
    try:
        found = json.loads(text.splitlines()[0].removeprefix(ORIGIN_MARK))
        return Origin(frozenset(found["asked"]), frozenset(found["preset"]))
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--config {file}: its line {ORIGIN_MARK.strip()} is damaged; remove that line") from None


def _assign(tree: Any, key: str, value: Any, given: set[str]) -> None:
    """Sets one key, or all keys of a mapping, and notes them in `given`. A term that is not there yet is added with its
    defaults."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    parts = key.split(".")
    if key.startswith(f"{KERNEL}.") or (key == KERNEL and isinstance(value, dict)):
        raise ConfigError(f"{KERNEL} is a key (auto, triton or torch), not a term; give the term another name")
    if isinstance(value, dict):
        _check_group(parts)
        if parts[0] == "alignment" and len(parts) == 2:
            _add_term(tree, parts[1], given)
        for name, inner in value.items():
            _assign(tree, f"{key}.{name}", inner, given)
        return
    hint = _check_key(parts)
    if parts[0] == "alignment" and key != KERNEL:
        _add_term(tree, parts[1], given)
    given.add(key)
    if value == "???":
        raise ConfigError(f"{key}=??? stands for a value that is still needed; give {key}={_describe(hint)}")
    try:
        OmegaConf.update(tree, KERNEL_FIELD if key == KERNEL else key, value, merge=False)
    except (OmegaConfBaseException, ValueError, TypeError):
        raise ConfigError(f"{key}={_show(value)} is not {_describe(hint)}") from None


def _add_term(tree: Any, name: str, given: set[str]) -> None:
    given.add(f"alignment.{name}")
    if name not in tree.alignment:
        tree.alignment[name] = TermConfig()


def _remove(tree: Any, key: str) -> None:
    group, _, name = key.partition(".")
    if group != "alignment" or not name or "." in name:
        raise ConfigError(f"~{key}: only an alignment term can be removed, as in ~alignment.repa")
    if name not in tree.alignment:
        raise ConfigError(f"~{key}: there is no such term{did_you_mean(name, tree.alignment)}")
    del tree.alignment[name]


def _check_key(parts: list[str]) -> Any:
    """The type of a key; a message with the nearest known one where there is none."""
    term = parts[1] if parts[0] == "alignment" and len(parts) > 1 and parts[1] else "NAME"
    keys = known_keys(term)
    key = ".".join(parts)
    if key in keys:
        return keys[key]
    if any(known.startswith(f"{key}.") for known in keys):
        raise ConfigError(f"{key} is a group of keys, not a key; for example {_example(keys, key)}")
    raise ConfigError(f"unknown key {key}{_nearest(key, keys)}")


def _check_group(parts: list[str]) -> None:
    term = parts[1] if parts[0] == "alignment" and len(parts) > 1 else "NAME"
    keys = known_keys(term)
    key = ".".join(parts)
    if not any(known.startswith(f"{key}.") for known in keys):
        if key in keys:
            raise ConfigError(f"{key} takes {_describe(keys[key]).removeprefix('a ')}, not a group of keys")
        raise ConfigError(f"unknown key {key}{_nearest(key, keys)}")


def _nearest(key: str, keys: dict[str, Any]) -> str:
    """The nearest key: by the whole name, else by the last part of it, else the keys of the same group."""
    import difflib

    if close := difflib.get_close_matches(key, keys, n=1, cutoff=0.75):
        return f"; did you mean {close[0]!r}?"
    lasts = {known.rpartition(".")[2]: known for known in reversed(keys)}  # of several the first
    if close := difflib.get_close_matches(key.rpartition(".")[2], lasts, n=1, cutoff=0.75):
        return f"; did you mean {lasts[close[0]]!r}?"
    group = key.rpartition(".")[0]
    siblings = [known for known in keys if known.rpartition(".")[0] == group]
    if group and siblings:
        return f"; {group} has: {', '.join(known.rpartition('.')[2] for known in siblings)}"
    groups = sorted({known.partition(".")[0] for known in keys})
    return did_you_mean(key.partition(".")[0], groups)


def _example(keys: dict[str, Any], group: str) -> str:
    return next(known for known in keys if known.startswith(f"{group}."))


def _describe(hint: Any) -> str:
    """A type in words."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (inner,) = (a for a in arguments if a is not type(None))
        return f"{_describe(inner)} or null"
    if typing.get_origin(hint) is list:
        return "a list of numbers such as [0.9,0.999]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def _to_config(tree: Any) -> Config:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:  # an interpolation such as ${oc.env:NAME}
        raise ConfigError(f"{error.full_key}: {_first_line(error)}; give the value itself") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
