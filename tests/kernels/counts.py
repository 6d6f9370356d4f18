"""What the kernel tests covered, for the line at the end of their output."""

COUNTS: dict[str, object] = {}
