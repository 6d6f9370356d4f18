"""Keeps passwords out of what is shown and stored."""

from __future__ import annotations

import re


def redacted(text: str) -> str:
    """`text` without the passwords of the URIs in it: `://me:secret@host` and `?password=secret`."""
    text = re.sub(r"(://[^:/@\s]*):\S*@", r"\1:***@", text)
    return re.sub(r"(?i)([?&]\w*(?:password|passwd|pwd|token|secret)=)[^&\s]*", r"\1***", text)
