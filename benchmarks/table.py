"""The newest rows of benchmarks/results as the table of the README, which a test compares with it.

python -m benchmarks.table
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.rows import RESULTS

Row = dict[str, Any]


def main() -> None:
    print(table())


def table() -> str:
    """Markdown: of each benchmark and device the newest row, in the order of `LINES`."""
    lines = ["| what | measured | goal | on |", "|---|---|---|---|"]
    for name, cells in LINES.items():
        for row in newest(name):
            lines += [f"| {what} | {measured} | {goal} | {row['device']} |" for what, measured, goal in cells(row)]
    return "\n".join(lines)


def newest(name: str) -> list[Row]:
    """The last row of each device, and of each `case` where a benchmark has several."""
    file = RESULTS / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({(row["device"], row.get("case")): row for row in rows}.values())


def _overhead(row: Row) -> Iterator[tuple[str, str, str]]:
    ours, host = row["SiT-S/2"], row["host"]["seconds"]
    for key, what in (("plain", "without DeepSpeed"), ("zero3", "under ZeRO-3, one process")):
        measured = f"{ours[f'{key}_over_bare']:.2f} times"
        yield f"our step of SiT-S/2 against a bare torch loop, {what}", measured, f"at most {row['goals'][key]}"
    measured = f"{1e3 * host['zero3']:.0f} ms; bare loop {1e3 * host['bare']:.0f} ms"
    yield "host time of a step of 28 blocks of width 64, ZeRO-3, bf16", measured, "recorded"


def _memory(row: Row) -> Iterator[tuple[str, str, str]]:
    worlds = sorted({case["processes"] for case in row["rows"]})
    what = f"bytes a parameter and rank under ZeRO-3 against the arithmetic, {len(row['rows'])} cases"
    yield f"{what} on {', '.join(map(str, worlds))} processes", f"{row['worst']:.1%} off at most", f"{row['goal']:.0%}"


def _loader(row: Row) -> Iterator[tuple[str, str, str]]:
    for case in row["rows"]:
        measured = f"{case['ratio']:.2f} times ({case['loader']:,.0f} images/s)"
        yield f"loader against plain files and Pillow, {case['case']}", measured, f"at least {row['goal']}"


def _data(row: Row) -> Iterator[tuple[str, str, str]]:
    if "of_plain_reads" in row:
        what = f"{row['case']}, {row['bytes'] / 1e6:.1f} MB an image, against plain reads of the same bytes"
        measured = f"{row['of_plain_reads']:.2f} times ({row['images_per_second']:,.0f} images/s)"
        yield what, measured, f"at least {row['goal']}"
        return
    rates, peer = row["images_per_second"], row["fastest_peer"]
    what = f"loader with {row['workers']} process, {row['case']}:"
    for way, share in row["of_limit"].items():
        decoder = "DALI" if "DALI" in way else "Pillow"
        measured = f"{share:.2f} times ({rates[way]:,.0f} images/s)"
        yield f"{what} against {decoder} decoding alone out of memory", measured, f"at least {row['goal']}"
    against = f"{row['of_fastest_peer']:.2f} times ({peer})"
    yield f"{what} against the fastest of streaming, torchvision and WebDataset", against, "at least 1"


def _random(row: Row) -> Iterator[tuple[str, str, str]]:
    yield "counter-based random numbers, share of a step of SiT-S/2", f"{row['share']:.2%}", f"under {row['goal']:.0%}"


def _pair(row: Row) -> Iterator[tuple[str, str, str]]:
    what = f"{row['case']}, {row['model']}, {row['step']} steps on {row['world_size']} processes, REPA and baseline:"
    ours, theirs = row["repa"], row["baseline"]
    yield f"{what} denoising loss", f"{ours['denoising_loss']:.4f} and {theirs['denoising_loss']:.4f}", "recorded"
    rates = f"{ours['images_per_second']:.0f} and {theirs['images_per_second']:.0f}"
    yield f"{what} images/s", f"{rates} (encoder {ours['encoder_share']:.0%} of a step)", "recorded"
    if "label_agreement" in ours:
        read = f"{ours['label_agreement']:.0%} and {theirs['label_agreement']:.0%}"
        yield f"{what} samples read as the label asked for", read, "at least 70 %"


def _throughput(row: Row) -> Iterator[tuple[str, str, str]]:
    measured = f"{row['images_per_second']:.0f} images/s, {row['mfu']:.0%} MFU, {row['peak_memory_bytes'] / 1e9:.0f} GB"
    yield f"{row['model']} with DINOv2-B, {row['case']}", measured, "recorded"


LINES: dict[str, Callable[[Row], Iterator[tuple[str, str, str]]]] = {
    "step_overhead": _overhead,
    "zero_memory": _memory,
    "loader": _loader,
    "data": _data,
    "rng": _random,
    "pair": _pair,
    "train_throughput": _throughput,
}


if __name__ == "__main__":
    main()
