"""A run that is started again keeps the identity values that it stored, wherever the user did not ask for others."""

from __future__ import annotations

import copy
from dataclasses import Field
from typing import Any

from repa_scale.compose import Origin
from repa_scale.config import Config, TermConfig, from_dict
from repa_scale.identity import (
    FILES,
    KINDS_OF_WEIGHTS,
    STORED_MOMENTS,
    STORED_TOKENS,
    differing,
    filled,
    identity_keys,
    identity_value,
    settings,
    stored_features,
    term_names,
    term_settings,
)


def with_stored_values(config: Config, stored: dict[str, Any], origin: Origin) -> tuple[Config, list[str]]:
    """The configuration of a resumed run, and a line `key: value -> stored value` for each key taken from it.

    What the user asked for stays, and so does what a preset sets to another value than the run has: identity.differing
    finds those, and the start is refused. A file of weights stays too: the run stored its name, not its folder.

    Args:
        config: completed (compose.py); it is not changed.
        stored: identity keys of the run (RUN/identity.json, or the manifest of a checkpoint).
        origin: which of the configuration's values were asked for.
    """
    run, theirs = copy.deepcopy(config), filled(stored)

    def take(key: str, owner: Any, field: Field) -> None:
        if key not in theirs or identity_value(owner, field) == theirs[key]:
            return
        if origin.asks_for(key, stored) or _names_a_file(field.name, theirs[key]):
            return
        setattr(owner, field.name, copy.copy(theirs[key]))

    for key, owner, field in settings(run):
        take(key, owner, field)
    have = stored_features(run)
    if any(theirs[key] != on for key, on in have.items()) and not origin.asks_for("data.source", stored):
        run.data.source = (
            ("moments+tokens" if theirs[STORED_TOKENS] else "moments") if theirs[STORED_MOMENTS] else "image"
        )
    if run.method != "baseline":
        _take_terms(run, stored, origin)
        for key, owner, field in list(term_settings(run)):
            take(key, owner, field)
    return run, differing(identity_keys(config, ""), identity_keys(run, ""))


def _take_terms(run: Config, stored: dict[str, Any], origin: Origin) -> None:
    """Adds the stored terms that are missing, and drops those that the run does not have."""
    names = term_names(stored)
    for name in names:
        if name not in run.alignment and not origin.names_terms(name):
            prefix = f"alignment.{name}."
            values = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
            known = set(TermConfig.__dataclass_fields__)
            if set(values) <= known and not any(_names_a_file(key, value) for key, value in values.items()):
                run.alignment[name] = from_dict(values, TermConfig)
    for name in set(run.alignment) - set(names):
        if names and not origin.names_terms(name):
            del run.alignment[name]


def _names_a_file(field: str, value: Any) -> bool:
    return field in FILES and value not in ("", *KINDS_OF_WEIGHTS)
