"""The newest figures of the kernel benchmark as CSV and as a plot (SVG), a pair of files for each device.

python -m benchmarks.kernel_plot [kernels.jsonl]
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from benchmarks.command import Parser, answered
from benchmarks.rows import results_folder
from repa_scale.errors import UserError

COLOURS = {"ours": "#2f6f9f", "eager": "#b9bec4", "compile": "#d79a3c", "public loop": "#8f5a88"}
BAR, LEFT, SCALE = 16, 330, 420
COLUMNS = (
    "kernel", "rows", "width", "who", "bytes", "flops", "limit_seconds", "seconds", "forward_seconds", "host_seconds",
    "host_bound", "bandwidth", "peak_bytes", "not_measured",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, rehearsal=False)
    parser.prog = "kernel_plot"
    parser.add_argument("file", nargs="?", type=Path, help="default: kernels.jsonl of benchmarks/results")
    args = parser.parse_args(argv)
    return answered(lambda: plot(args.file or results_folder() / "kernels.jsonl"))


def plot(file: Path) -> int:
    """Writes the files beside `file`.

    Raises:
        UserError: there is no such file, or no row of a competitor in it.
    """
    if not file.is_file():
        raise UserError(f"{file} does not exist; run python -m benchmarks.kernels first")
    rows = [row for row in map(json.loads, file.read_text().splitlines()) if "who" in row]
    if not rows:
        raise UserError(f"{file} has no row of a competitor; run python -m benchmarks.kernels first")
    newest = {(row["device"], row["case"]): row for row in rows}.values()
    for device in dict.fromkeys(row["device"] for row in newest):
        mine = [row for row in newest if row["device"] == device]
        name = "kernels-" + "".join(c if c.isalnum() else "_" for c in device)
        with (file.parent / f"{name}.csv").open("w", newline="") as table:
            writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(mine)
        (file.parent / f"{name}.svg").write_text(bars(mine, device))
        print(file.parent / f"{name}.svg")
    return 0


def bars(rows: list[dict], title: str) -> str:
    """Microseconds forward and backward, a bar for each competitor; each group drawn to its own largest."""
    groups: dict[tuple, list[tuple[str, float]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["rows"], row["width"]), []).append(
            (row["who"], 1e6 * row.get("seconds", 0.0))
        )
    lines, y = [f'<text x="10" y="20" font-weight="bold">{title}: us, forward and backward</text>'], 36
    for (kernel, count, width), members in groups.items():
        y += 18
        lines.append(f'<text x="10" y="{y}">{kernel}, {count} rows x {width}</text>')
        largest = max(value for _, value in members) or 1.0
        for who, value in members:
            y += BAR + 2
            colour = COLOURS.get(who.split(",")[0], "#6fa37a")
            length = SCALE * value / largest
            lines.append(f'<text x="{LEFT - 8}" y="{y}" text-anchor="end">{who}</text>')
            lines.append(f'<rect x="{LEFT}" y="{y - 11}" width="{length:.1f}" height="{BAR - 3}" fill="{colour}"/>')
            shown = f"{value:.1f}" if value else "not measured"
            lines.append(f'<text x="{LEFT + length + 6:.1f}" y="{y}">{shown}</text>')
        y += 8
    size = f'width="900" height="{y + 20}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>\n"])


if __name__ == "__main__":
    sys.exit(main())
