"""A plot of the kernel benchmark as SVG: a bar for each competitor, by kernel, rows and width."""

from __future__ import annotations

COLOURS = {"ours": "#2f6f9f", "eager": "#b9bec4", "compile": "#d79a3c", "public loop": "#8f5a88"}
BAR, LEFT, SCALE = 16, 330, 420


def bars(rows: list[dict], title: str) -> str:
    """Microseconds forward and backward, each group drawn to its own largest."""
    groups: dict[tuple, list[tuple[str, float]]] = {}
    for row in rows:
        value = 1e6 * row["seconds"] if row["seconds"] else 0.0
        groups.setdefault((row["kernel"], row["rows"], row["width"]), []).append((row["who"], value))
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
