"""Class names and numbers: what the caller may call a class, and reading names from a file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repa_scale.errors import UserError
from repa_scale.serving.settings import shown

SUGGESTIONS = 3


@dataclass(frozen=True)
class LabelNames:
    """The classes of a model.

    Attributes:
        null: the number that stands for no class; the classes are 0 to null - 1.
        names: of each class; the class's number as text where it has no name.
    """

    null: int
    names: tuple[str, ...]
    numbers: Mapping[str, int]

    @staticmethod
    def of(num_classes: int, id2label: Mapping | None) -> LabelNames:
        """From the names by number, as diffusers keeps them: several names of a class are parted by commas."""
        given = {int(number): str(name) for number, name in (id2label or {}).items()}
        names = tuple(given.get(number, str(number)) for number in range(num_classes))
        numbers: dict[str, int] = {}
        for number in range(num_classes):
            whole = given.get(number, "")
            for name in (whole, *whole.split(",")):
                if key := _key(name):
                    numbers.setdefault(key, number)
        return LabelNames(num_classes, names, numbers)

    def number(self, label: int | str | None) -> int:
        """The number of a class that is called by number or name; None: no class.

        Raises:
            UserError: no such class; it names the nearest.
        """
        if label is None:
            return self.null
        if isinstance(label, str):
            return self._named(label)
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise UserError(f"class {shown(label)} is neither a number nor a name")
        if not 0 <= label <= self.null:
            last = f"0 to {self.null - 1}, and {self.null} for none" if self.null else "none: only 0"
            raise UserError(f"class {shown(label)} is out of range; this model has classes {last}")
        return int(label)

    def _named(self, label: str) -> int:
        if (key := _key(label)) in self.numbers:
            return self.numbers[key]
        if label.strip().isdecimal():
            return self.number(int(label))
        if not self.numbers:
            raise UserError(f"class {shown(label)}: this model was exported without class names; give a number")
        close = difflib.get_close_matches(key, self.numbers, n=SUGGESTIONS, cutoff=0.6)
        close += [name for name in self.numbers if key in name and name not in close][: SUGGESTIONS - len(close)]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"give a name, or 0 to {self.null - 1}"
        raise UserError(f"class {shown(label)} is not a class of this model; {hint}")


def read_class_names(path: Path, num_classes: int) -> list[str]:
    """Names by number: a text file with a name a line, or JSON: a list, {"0": name} or {"0": [wnid, name]}.

    Raises:
        UserError: the file cannot be read, or has not exactly `num_classes` names.
    """
    try:
        text = path.read_text(encoding="utf-8")
        names = _from_json(json.loads(text)) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--class-names {path} cannot be read ({error}); give a text file with a name a line") from None
    names = [name.strip() for name in names]
    if len(names) != num_classes or not all(names):
        raise UserError(f"--class-names {path} has {len(names)} names, but the model {num_classes} classes")
    return names


def _from_json(value: Sequence | Mapping) -> list[str]:
    rows = [value[str(i)] for i in range(len(value))] if isinstance(value, Mapping) else value
    return [(row[-1] if isinstance(row, list) else str(row)).replace("_", " ") for row in rows]


def _key(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
