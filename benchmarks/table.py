"""The newest rows of benchmarks/results as the tables of the README, which a test compares with it.

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
    """Markdown: of each benchmark and device the newest row, in the order of `SECTIONS`."""
    sections = []
    for title, benchmarks in SECTIONS.items():
        lines = [f"| {title} | measured | goal | on |", "|---|---|---|---|"]
        for name, cells in benchmarks.items():
            for row in newest(name):
                lines += [f"| {what} | {measured} | {goal} | {row['device']} |" for what, measured, goal in cells(row)]
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


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
    measured = row.get("error", "")
    if not measured:
        share = f"{row['mfu']:.0%} MFU, " if row["mfu"] is not None else ""
        measured = f"{row['images_per_second']:.0f} images/s, {share}{row['peak_memory_bytes'] / 1e9:.0f} GB"
    yield f"{row['model']} with DINOv2-B, {row['case']}", measured, "recorded"


def _evaluate(row: Row) -> Iterator[tuple[str, str, str]]:
    case = row["case"]
    if row["part"] == "sampling":
        measured = f"{row['ratio']:.1f} times ({row['ours']:.0f} images/s)"
        yield f"drawing samples, {case}: against the public loop", measured, f"at least {row['goal']:.0f}"
        if "half" in case:
            measured = f"{row['of_public_with_guidance_throughout']:.1f} times"
            yield f"drawing samples, {case}: against the public loop, guided throughout", measured, "at least 1.3"
    elif "peak_gb" in row:
        what = f"peak {case}, {row['images']:,} images against as many"
        yield what, f"{row['peak_gb']:.1f} GB", "4 GB for 50,000"
    else:
        rate = f" ({row['images_per_second']:.0f} images/s)" if "images_per_second" in row else ""
        yield f"{case}: against torch-fidelity", f"{row['ratio']:.1f} times{rate}", "at least 1"


def _compare(row: Row) -> Iterator[tuple[str, str, str]]:
    what = f"comparing {row['runs']} runs of {row['points_a_run']:,} points out of MLflow"
    yield what, f"{row['seconds']:.1f} s", f"at most {row['goal']:.0f} s"


def _durability(row: Row) -> Iterator[tuple[str, str, str]]:
    ours, theirs = row["save"]["ours, behind"], row["save"]["DeepSpeed save_checkpoint"]
    size = f"{row['model']}, {row['bytes'] / 1e9:.1f} GB of state on 2 processes:"
    measured = f"{ours['stop_seconds']:.2f} s; DeepSpeed's {theirs['stop_seconds']:.2f} s"
    yield f"{size} training stops for a checkpoint", measured, "not longer"
    load = row["load"]
    measured = f"{load['ours_seconds']:.1f} s; DeepSpeed's conversion {row['universal_seconds']:.0f} s before it loads"
    yield f"{size} taken up on 1 process, verified", measured, "not longer"
    if "restart" in row:
        again = row["restart"]
        measured = f"{again['kill_to_new_step_seconds']:.1f} s; its imports alone {again['imports_seconds']:.1f} s"
        yield (
            "from SIGKILL of 2 processes to the first new step of the run, started again at once",
            measured,
            "recorded",
        )


def _soak(row: Row) -> Iterator[tuple[str, str, str]]:
    what = f"two nodes, {row['steps']:,} steps with {len(row['faults'])} faults in {row['minutes']:.0f} minutes"
    yield what, "the curve of an undisturbed run, to the last bit", "the same"


def _export(row: Row) -> Iterator[tuple[str, str, str]]:
    what = f"exporting {row['model']} from 2 ranks' checkpoint: against zero_to_fp32.py"
    measured = f"{row['time_ratio']:.2f} of its time, {row['memory_ratio']:.2f} of its memory"
    yield what, measured, "at most 1 and 0.25"


def _forms(row: Row) -> Iterator[tuple[str, str, str]]:
    forms = row["forms"]
    worst = max(forms, key=lambda name: forms[name]["latents"] or 0.0)
    what = f"one seed in {len(forms)} forms of an export ({', '.join(forms)}): largest difference of images"
    measured = f"{max(form['images'] for form in forms.values())} of 255; latents {forms[worst]['latents']:.0e}"
    yield what, f"{measured} ({worst})", f"at most {row['bound']}"


def _serve(row: Row) -> Iterator[tuple[str, str, str]]:
    server = row["server"]
    what = f"the server above the pipeline, {row['model']}, 8 images of {server['steps']} steps a request"
    yield what, f"{server['overhead']:.1%}", f"at most {row['goal']:.0%}"
    case = row["cases"][-1]
    seconds = case["seconds"]
    if "dit" in seconds and "decoded" in seconds:
        what = f"our pipeline against diffusers' DiTPipeline, {case['batch']} images of {case['steps']} steps, decoded"
        yield what, f"{seconds['dit'] / seconds['decoded']:.2f} times", "recorded"


Cells = Callable[[Row], Iterator[tuple[str, str, str]]]
SECTIONS: dict[str, dict[str, Cells]] = {
    "Training": {
        "step_overhead": _overhead,
        "zero_memory": _memory,
        "rng": _random,
        "train_throughput": _throughput,
        "pair": _pair,
    },
    "Data": {"loader": _loader, "data": _data},
    "Durability": {"durability": _durability, "soak": _soak},
    "Evaluation": {"evaluate": _evaluate, "evaluate_compare": _compare},
    "Export and serving": {"export": _export, "forms": _forms, "serve": _serve},
}


if __name__ == "__main__":
    main()
