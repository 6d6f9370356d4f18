"""Imports the results of benchmarks/gpu.sh: rows into benchmarks/results, the checkpoint verified, tables printed.

    python -m benchmarks.collect DIR

Rows that are there already are not added again. The trace is kept under the device's name; the log and the checkpoint
stay in DIR.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import rows as results
from benchmarks.command import Parser, answered
from repa_scale.errors import DataError

Row = dict[str, Any]
TRACE = "trace.json.gz"
REPORTS = ("profile_step", "nvjpeg")  # have tables of their own


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, rehearsal=False)
    parser.prog = "collect"
    parser.add_argument("folder", type=Path, metavar="DIR", help="what benchmarks/gpu.sh left in --out")
    args = parser.parse_args(argv)
    return answered(lambda: _of_this_version(args.folder))


def _of_this_version(folder: Path) -> int:
    try:
        return collect(folder)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{folder} holds rows that this version does not understand ({what}); collect them with the code that "
            "wrote them"
        ) from None


def collect(folder: Path) -> int:
    """Prints the tables and files the rows (a rehearsal's are never filed). Returns 1 if the checkpoint is wrong.

    Raises:
        DataError: it is not a folder of results, or a row is damaged.
    """
    rows = read(folder)
    device = next((row["device"] for row in rows if "device" in row), "unknown")
    rehearsal = any(row.get("rehearsal") for row in rows)
    for title, lines in tables(rows):
        print(f"### {title} ({device})\n\n" + "\n".join(lines) + "\n")
    report(folder, rows, device)
    if rehearsal:
        print("This is a rehearsal: no rows were filed.")
    else:
        added = file_rows(rows, device)
        print(f"{added} new rows of {len(rows)} in {results.RESULTS}")
        if (folder / TRACE).is_file():
            name = "".join(c if c.isalnum() else "_" for c in device)
            shutil.copyfile(folder / TRACE, results.RESULTS / f"trace-{name}.json.gz")
    return verify(folder)


def read(folder: Path) -> list[Row]:
    """All rows of a folder of results."""
    if not (folder / "summary.jsonl").is_file():
        raise DataError(f"{folder} holds no summary.jsonl; name the folder that benchmarks/gpu.sh wrote (--out)")
    rows = []
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
                row["benchmark"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{file}, line {number} is damaged ({error}); copy the folder again") from None
            rows.append(row)
    return rows


def report(folder: Path, rows: list[Row], device: str) -> None:
    """Prints what has tables of its own."""
    from benchmarks import nvjpeg, profile_step

    for row in rows:
        if row["benchmark"] == "profile_step" and (folder / TRACE).is_file():
            text = profile_step.report(row, folder / TRACE)
            print(f"### Profile, {row['case']} ({device})\n\n```\n{text}\n```\n")
        elif row["benchmark"] == "nvjpeg":
            print(f"### nvJPEG ({device})\n")
            nvjpeg.show(row["differences"], row["images_per_second"])
            print()


def file_rows(rows: Iterable[Row], device: str) -> int:
    """Appends the rows that are not there yet to results/BENCHMARK.jsonl; returns how many.

    How the pieces ended is stored without a device by the program; it is added here.
    """
    added = 0
    environment = next((row for row in rows if row["benchmark"] == "environment"), {})
    for row in rows:
        told = {key: environment[key] for key in ("commit", "date") if key in environment}
        line = json.dumps({**told, "device": device, **row} if row["benchmark"] == "gpu" else row)
        file = results.RESULTS / f"{Path(row['benchmark']).name}.jsonl"
        known = file.read_text().splitlines() if file.exists() else []
        if line not in known:
            with file.open("a") as out:
                out.write(line + "\n")
            added += 1
    return added


def verify(folder: Path) -> int:
    """Reads the checkpoint that truth wrote there, and draws its samples on this CPU."""
    from benchmarks.truth import TAR, read_back

    if not (folder / TAR).is_file():
        print(f"no {TAR}: truth did not come that far")
        return 0
    checks = read_back(folder / TAR)
    print("\n".join(map(str, checks)))
    return 0 if all(check.passed for check in checks) else 1


def tables(rows: list[Row]) -> Iterable[tuple[str, list[str]]]:
    """A title and the lines of a markdown table for each kind of result."""
    of = {name: [row for row in rows if row["benchmark"] == name] for name in {row["benchmark"] for row in rows}}
    if environment := of.get("environment"):
        facts = {**(environment[-1].get("gpu") or {}), **environment[-1]["versions"]}
        yield "Machine", table(("", ""), [(key, value) for key, value in facts.items()])
    yield (
        "Pieces",
        table(
            ("piece", "", "exit code", "seconds"),
            [
                (
                    row["piece"],
                    ": ".join(filter(None, (row["state"], row.get("reason")))),
                    row["exit_code"],
                    row["seconds"],
                )
                for row in of.get("gpu", ())
            ],
        ),
    )
    if truth := of.get("truth"):
        cells = [
            (row["case"], row["check"], f"{row['value']:.2g}", f"{row['bound']:.2g}", "yes" if row["passed"] else "NO")
            for row in truth
        ]
        yield "Truth", table(("case", "what", "value", "at most", "holds"), cells)
    if throughput := of.get("train_throughput"):
        yield "Throughput", table(*_throughput(throughput))
    if kernels := of.get("kernels"):
        yield "Kernels", table(*_plain(kernels))
    for name in sorted(set(of) - {"environment", "gpu", "truth", "train_throughput", "kernels", *REPORTS}):
        yield name, table(*_plain(of[name]))


def _throughput(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple]]:
    head = ("case", "images/s", "step, ms", "host, ms", "MFU", "peak memory, GB")
    cells = []
    for row in rows:
        if "error" in row:
            cells.append((row["case"], row["error"], "", "", "", ""))
            continue
        milliseconds = (f"{1e3 * row[key]:.1f}" for key in ("step_seconds", "host_seconds"))
        mfu = f"{row['mfu']:.1%}" if row.get("mfu") is not None else "not known"
        peak = f"{row['peak_memory_bytes'] / 1e9:.1f}"
        cells.append((row["case"], f"{row['images_per_second']:.1f}", *milliseconds, mfu, peak))
    return head, cells


def _plain(rows: list[Row]) -> tuple[tuple[str, ...], list[tuple]]:
    """The scalars of the rows, a column each."""
    known = ("benchmark", "device", "torch", "python", "commit", "date", "rehearsal")
    scalars = [{k: v for k, v in row.items() if k not in known and not isinstance(v, (dict, list))} for row in rows]
    head = tuple(dict.fromkeys(key for row in scalars for key in row))
    return head, [tuple(_short(row.get(key, "")) for key in head) for row in scalars]


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def table(head: tuple[str, ...], cells: Iterable[tuple]) -> list[str]:
    """A markdown table."""
    lines = [head, ("---",) * len(head), *cells]
    return [
        "| " + " | ".join("" if cell is None else str(cell).replace("|", "/") for cell in line) + " |" for line in lines
    ]


if __name__ == "__main__":
    sys.exit(main())
