"""Every variant of every kernel, compiled for GPUs that are not here: registers, shared memory, no spills, bytes moved.

`bounds.json` holds what was recorded; `python tests/kernels/test_ahead_of_time.py` records it anew.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from repa_scale.kernels import report
from repa_scale.kernels.ahead_of_time import KERNELS, build, variants

FILE = Path(__file__).parent / "bounds.json"
triton = pytest.importorskip("triton")


def build_all(complete):
    """In two processes of their own, because this one may run under the interpreter or hold a GPU."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(build, variants(complete), chunksize=8))


@pytest.fixture(scope="module")
def built():
    from counts import COUNTS

    found = build_all(complete=False)
    for architecture in sorted({b.variant.architecture for b in found}):
        count = sum(b.variant.architecture == architecture for b in found)
        COUNTS[f"variants for sm_{architecture}"] = count
    return found


def test_nothing_spills(built):
    assert not [b.variant.name for b in built if b.spilled]


def test_registers_and_shared_memory_stay_within_what_was_recorded(built):
    recorded = json.loads(FILE.read_text())
    if recorded["triton"] != triton.__version__:
        pytest.skip(f"recorded with triton {recorded['triton']}, this is {triton.__version__}")
    assert not {b.variant.name for b in built} - set(recorded["variants"]), "not recorded yet"
    over = []
    for b in built:
        registers, shared = recorded["variants"][b.variant.name]
        if b.registers > registers or b.shared > shared:
            over.append((b.variant.name, b.registers, registers, b.shared, shared))
    assert not over


def test_the_bytes_moved_are_the_fewest_possible(built):
    """Counted from the code: each operand once; and 12 or 16 bytes a row of scalars."""
    size = {"bf16": 2, "fp16": 2, "fp32": 4}
    for b in built:
        first, second = (size[d] for d in (*b.variant.dtypes, *b.variant.dtypes, "fp32", "fp32")[:2])
        z, rows = b.variant.width, b.variant.tile.rows
        wanted = {
            "cosine_forward": (first + second) * z + 16,  # weight, loss, two scalars
            "cosine_backward": (2 * first + second) * z + 16,  # weight, upstream, two scalars
            "layernorm": (first + second) * z + 8 * z / rows,  # the affine weights once a program, from the cache
            "spatial": (first + second) * z,
            "silu_backward": 4 * first * z + 4 * z / rows,  # a partial sum of the bias gradient
            "group_sums": 4 * z,
        }[b.variant.kernel]
        assert b.bytes_a_row == wanted, b.variant.name


def test_memory_is_read_in_wide_words(built):
    """What a thread loads and stores in the machine code is its share of the tile: nothing is read twice."""
    size = {"bf16": 2, "fp16": 2, "fp32": 4}
    planes = {"cosine_forward": ((0, 1), ()), "cosine_backward": ((0, 1), (0,)), "layernorm": ((0,), (1,))}
    planes |= {"spatial": ((0,), (1,)), "silu_backward": ((0, 0), (0, 0))}
    for b in built:
        if b.variant.kernel not in planes or (b.variant.tile.columns < 64 and b.variant.kernel != "spatial"):
            continue
        threads = 32 * b.variant.tile.warps
        share = b.variant.tile.rows * b.variant.tile.columns / threads
        for found, which in zip(b.thread_bytes, planes[b.variant.kernel], strict=True):
            least = sum(size[b.variant.dtypes[i]] for i in which) * share
            # Scalars of a row, affine weights and partial sums come on top: at most 8 bytes an element of a row.
            assert least <= found <= least + 8 * max(b.variant.tile.columns * b.variant.tile.warps // 64, 16), (
                b.variant.name, found, least,
            )  # fmt: skip


def test_every_kernel_and_architecture_is_there(built):
    assert {(b.variant.kernel, b.variant.architecture) for b in built} == {
        (kernel, architecture) for kernel in KERNELS for architecture in (80, 90, 100)
    }


def test_the_report_has_a_line_for_each_variant(monkeypatch, capsys):
    some = variants(architectures=(90,))[:3]
    monkeypatch.setattr(report, "variants", lambda complete, architectures: some)
    assert report.main([]) == 0
    heading, *rows, last = capsys.readouterr().out.splitlines()
    assert heading.split() == list(report.HEADINGS) and last == "3 variants, 0 with spills"
    assert [row.split()[0] for row in rows] == [variant.kernel for variant in some]
    assert all(int(row.split()[6]) > 0 for row in rows)


def test_the_report_refuses_to_run_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "repa_scale.kernels.report"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64 and "TRITON_INTERPRET=1 is set" in done.stderr and "Traceback" not in done.stderr


if __name__ == "__main__":
    everything = build_all(complete=True)
    assert not any(b.spilled for b in everything), [b.variant.name for b in everything if b.spilled]
    bounds = {b.variant.name: [b.registers, b.shared] for b in everything}
    FILE.write_text(json.dumps({"triton": triton.__version__, "variants": bounds}, indent=0) + "\n")
    print(f"recorded {len(bounds)} variants in {FILE}", file=sys.stderr)
