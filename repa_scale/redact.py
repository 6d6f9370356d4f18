"""Keeps passwords out of what is shown and stored."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

_known: set[str] = set()


def never_show(values: Iterable[str]) -> None:
    """From here on `redacted` masks these too, wherever they stand."""
    _known.update(value for value in values if value)


def redacted(text: str) -> str:
    """`text` without the passwords of the URIs in it (`://me:secret@host`, `?password=secret`), and without the
    values that `never_show` was told."""
    for value in _known:
        text = text.replace(value, "***")
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|pwd|token|secret)=)[^&\s]*", r"\1***", text)


class RedactedFormatter(logging.Formatter):
    """Tracebacks of foreign libraries may show what they were given."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
