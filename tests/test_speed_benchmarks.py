"""The programs that measure training speed: host time, gaps, compilation, refusals. Their figures need a GPU."""

import gzip
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import kernel_host, kernels, profile_step, train_throughput
from benchmarks.graphs import compiled_graphs
from benchmarks.kernel_subjects import compiled
from benchmarks.kernel_timing import settled
from benchmarks.our_step import DEPTHS, run_config
from benchmarks.timeline import Span, busy_share, device_spans, find_gaps, phase_table, spans_of, write_trace
from benchmarks.waits import WARNING, Waits, unlisted
from repa_scale.compose import compose

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


# Host time.


class StepWithWaits:
    """10 ms of work and 30 ms of waiting for a device that is slow to answer; it keeps its own time of both."""

    parameters, skipped, phases = 1, 0, {"forward": 0.01}

    def __init__(self) -> None:
        self.worked, self.waited = [], []

    def __call__(self) -> None:
        began = time.perf_counter()
        time.sleep(0.010)
        worked = time.perf_counter()
        torch.cuda.synchronize()
        float(torch.ones(()))
        self.worked.append(worked - began)
        self.waited.append(time.perf_counter() - worked)

    def close(self) -> None: ...


@pytest.fixture
def slow_device(monkeypatch):
    """A device that answers each blocking call after a while."""
    read = torch.Tensor.__float__
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: time.sleep(0.020))
    monkeypatch.setattr(torch.Tensor, "__float__", lambda tensor: time.sleep(0.010) or read(tensor), raising=False)


def test_host_time_leaves_out_what_the_step_waits_for_the_device(slow_device):
    step = StepWithWaits()
    found = train_throughput.measure(step, 5, 60.0, 4, CPU)
    measured = slice(train_throughput.WARMUP, train_throughput.WARMUP + 5)
    assert found["waiting_seconds"] == pytest.approx(statistics.median(step.waited[measured]), abs=0.002)
    assert found["host_seconds"] == pytest.approx(statistics.median(step.worked[measured]), abs=0.002)
    assert found["host_seconds"] + 0.010 < found["step_seconds"]
    assert found["images_per_second"] == pytest.approx(4 / found["step_seconds"])
    assert found["step_seconds_p10"] <= found["step_seconds"] <= found["step_seconds_p90"]
    first, second = found["waits"]
    assert "synchronize" in first["place"] and "test_speed_benchmarks.py" in first["place"]
    assert "__float__" in second["place"] and second["calls_per_step"] == 1
    assert not found["host_bound"]


def test_the_calls_are_themselves_again_afterwards():
    before = {name: getattr(torch.Tensor, name) for name in ("item", "to", "__bool__")}
    with Waits(CPU) as waits:
        assert bool(torch.ones(()) > 0)
        assert [wait.calls for wait in waits.take()] == [1]
    assert before == {name: getattr(torch.Tensor, name) for name in before}
    assert "item" not in vars(torch.Tensor)


def test_waits_that_are_not_timed_are_reported(slow_device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.Tensor, "item", lambda _: warnings.warn(WARNING, stacklevel=1), raising=False)

    def step():
        torch.ones(()).item()  # timed, so known
        warnings.warn(f"{WARNING} (triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with Waits(CPU) as waits:
        found = unlisted(step, waits)
    ((place, calls),) = found.items()
    assert "test_speed_benchmarks.py" in place and calls == 1
    assert modes == ["warn", 0]


# Gaps and phases of a made-up step of 100 us: two streams of the device work from 10 to 40, one from 70 to 90.


def annotation(name: str, start: float, end: float) -> Span:
    return Span(name, "user_annotation", start, end, "main")


HOST = [
    annotation("step", 0, 100),
    annotation("forward", 0, 42),
    annotation("alignment", 20, 24),
    annotation("optimizer", 42, 100),
    annotation("ZeRO norm", 44, 68),
    Span("cudaLaunchKernel", "cuda_runtime", 2, 3, "main", 1),
    Span("cudaLaunchKernel", "cuda_runtime", 22, 23, "main", 2),
    Span("cudaLaunchKernel", "cuda_runtime", 62, 63, "autograd", 3),
    Span("aten::item", "cpu_op", 46, 61, "main"),
    Span("cudaStreamSynchronize", "cuda_runtime", 50, 60, "main"),
]
KERNELS = [
    Span("gemm", "kernel", 10, 30, correlation=1),
    Span("cosine", "kernel", 25, 40, correlation=2),  # on another stream
    Span("Memset", "gpu_memset", 26, 28, correlation=2),
    Span("adam", "kernel", 70, 90, correlation=3),
]
PHASES = ("forward", "alignment", "optimizer")


def test_the_longest_gaps_say_what_the_host_did():
    first, second, third = find_gaps(KERNELS, HOST, PHASES, (0, 100))
    assert (first.start, first.length, first.phase) == (40, 30, "optimizer")
    # ZeRO norm: 44 to 46 and 61 to 68, but for the launch; aten::item: 46 to 50 and 60 to 61
    assert first.host == (("cudaStreamSynchronize", 10), ("Python in ZeRO norm", 8), ("aten::item", 5))
    assert {(second.start, second.length, second.phase), (third.start, third.length, third.phase)} == {
        (0, 10, "forward"),
        (90, 10, "optimizer"),
    }
    assert find_gaps(KERNELS, HOST, PHASES, (0, 100), count=1) == [first]
    assert busy_share(KERNELS, (0, 100)) == pytest.approx(0.5)


def test_the_device_counts_for_the_phase_that_launched_it():
    table = phase_table([*HOST, *KERNELS], KERNELS, PHASES, (0, 100))
    assert table["forward"] == {"host_us": 38, "waiting_us": 0, "device_us": 20, "launches": 1}
    assert table["alignment"] == {"host_us": 4, "waiting_us": 0, "device_us": 17, "launches": 2}
    assert table["optimizer"] == {"host_us": 58, "waiting_us": 10, "device_us": 20, "launches": 1}
    assert table["other"] == {"host_us": 0, "waiting_us": 0, "device_us": 0, "launches": 0}


def test_without_a_device_the_innermost_operations_stand_in():
    outer, inner = Span("aten::linear", "cpu_op", 0, 10, "main"), Span("aten::addmm", "cpu_op", 2, 9, "main")
    assert device_spans([outer, inner, replace(outer, thread="autograd"), *HOST[:2]]) == [
        inner,
        replace(outer, thread="autograd"),
    ]


def test_a_trace_is_cut_to_its_limit(tmp_path):
    kernel = {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1.0, "dur": 2.0, "args": {"correlation": 7}}
    noise = [{"ph": "s", "cat": "ac2g", "id": os.urandom(16).hex()} for _ in range(200)]
    trace = {"traceEvents": [kernel, *noise], "displayTimeUnit": "ms"}
    assert write_trace(trace, tmp_path / "whole.json.gz", 1 << 20) == []
    assert write_trace(trace, tmp_path / "cut.json.gz", 1000) == ["ac2g"]
    left = json.loads(gzip.decompress((tmp_path / "cut.json.gz").read_bytes()))
    assert left == {"traceEvents": [kernel], "displayTimeUnit": "ms"}
    assert spans_of(left["traceEvents"]) == [Span("gemm", "kernel", 1.0, 3.0, "", 7)]


# Compilation.


def test_more_shapes_than_torch_keeps_for_one_function_are_compiled_each():
    def work(i):
        return i["x"].square().sum()

    before = compiled_graphs()
    with torch._dynamo.config.patch(recompile_limit=2):
        for size in range(2, 6):
            call = compiled(work, "aot_eager")
            for _ in range(2):
                call({"x": torch.ones(size)})
    assert compiled_graphs() - before == 4


def test_calls_are_halved_until_the_host_stays_ahead():
    assert settled(lambda calls: (1.0, 1.0, calls <= 5), 20) == 5
    assert settled(lambda calls: (1.0, 1.0, calls <= 1), 20) == 1
    assert settled(lambda calls: (1.0, 1.0, False), 20) == 0


# Host time of the kernels.


def test_the_kernels_cost_the_host_little_more_than_an_empty_autograd_function(tmp_path, monkeypatch, capsys):
    """In turn with it, so that what disturbs one disturbs both. Through operators it took 4 to 5 times as long."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("BENCHMARK_OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernel_host.main(["--rounds", "40"]) == 0
    (row,) = map(json.loads, (tmp_path / "other.jsonl").read_text().splitlines())
    seconds = row["seconds"]
    assert row["case"] == "stubbed" and f"{1e6 * seconds['cosine']:.1f} us" in capsys.readouterr().out
    empty = seconds["empty function, with backward"]
    assert seconds["cosine, with backward"] < 2.5 * empty
    assert seconds["cosine by image, with backward"] < 2.5 * empty
    assert seconds["layernorm"] < empty and seconds["spatial"] < empty


# Configurations and refusals.


def test_ours_runs_the_presets_of_the_paper():
    for model, depth in DEPTHS.items():
        if model == "SiT-Nano/2":
            continue
        preset = compose([f"experiment=repa_sit_{model[4:-2].lower()}"])
        ours = run_config(model, "dinov2-vit-b", 256)
        assert preset.alignment["repa"].depth == depth
        ours.run, ours.data.source, ours.alignment["repa"].weights = preset.run, "image", "hub"
        assert asdict(ours) == asdict(preset)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        (train_throughput, "--way public --batch 4", "--way public needs --public DIR"),
        (train_throughput, "--way public --public . --model SiT-S/2", "use SiT-B/2, SiT-L/2, SiT-XL/2"),
        (train_throughput, "--way public --public no/such", "--public no/such has no loss.py"),
        (train_throughput, "--way public --public . --compile", "belong to --way ours"),
        (train_throughput, "--way ours --public .", "belong to --way public"),
        (train_throughput, "--way ours --stage 1 --no-overflow-check", "give --stage 2"),
        (train_throughput, "--way ours --batch 0", "must be a whole number of at least 1"),
        (train_throughput, "--way ours --model SiT-Q/2", "--model SiT-Q/2 has no preset"),
        (profile_step, "--encoder dino", "encoder=dino is not an encoder"),
        (kernels, "--rows 100", "--rows 100 is not a multiple of 256"),
    ],
)
def test_bad_arguments_are_one_line(program, words, message, capsys):
    try:
        code = program.main(words.split())
    except SystemExit as leaving:
        code = leaving.code
    err = capsys.readouterr().err
    assert code == 64
    assert message in err and err.count("\n") == 1


def test_too_little_memory_is_one_line_and_a_row(monkeypatch, tmp_path, capsys):
    def build(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(train_throughput, "build", build)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a rehearsal sets it
    monkeypatch.setenv("BENCHMARK_OUT", str(tmp_path))
    assert train_throughput.main(["--way", "ours", "--rehearse"]) == 1
    err = capsys.readouterr().err
    assert "memory does not suffice (CUDA out of memory. Tried to allocate 2.00 GiB.)" in err and err.count("\n") == 1
    (row,) = map(json.loads, (tmp_path / "train_throughput.jsonl").read_text().splitlines())
    assert row["error"] in err and row["rehearsal"] and row["case"] == "ours, batch 2, SiT-Nano/2"


def test_the_matrix_product_is_measured_once_for_all_processes(monkeypatch, tmp_path):
    from benchmarks import peak
    from benchmarks.rows import write_row

    monkeypatch.setenv("BENCHMARK_OUT", str(tmp_path))
    monkeypatch.setattr(peak, "_measured", lambda _: 2e12)
    assert peak.product_flops(CPU) == 2e12
    write_row("train_throughput", {"product_flops_per_second": 3e12})
    assert peak.product_flops(CPU) == 3e12


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("words", "file", "keys"),
    [
        ("train_throughput --way ours --compile", "train_throughput.jsonl", {"host_seconds", "mfu_of_product"}),
        ("train_throughput --way ours --stage 2 --no-overflow-check", "train_throughput.jsonl", {"limit_seconds"}),
        ("profile_step", "other.jsonl", {"phases", "gaps"}),
        ("kernels", "kernels.jsonl", {"limit_seconds"}),
    ],
)
def test_rehearsals_run_through(words, file, keys, tmp_path):
    program, *rest = words.split()
    command = [sys.executable, "-m", f"benchmarks.{program}", "--rehearse", *rest]
    environment = {**os.environ, "BENCHMARK_OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / file).read_text().splitlines()[-1])
    assert row["rehearsal"] and keys <= set(row)
    if program == "profile_step":
        assert (tmp_path / "trace.json.gz").stat().st_size < profile_step.LIMIT
        assert all(row["phases"][phase]["host_us"] > 0 for phase in profile_step.PHASES)
        assert not row["not_annotated"]
    if "--compile" in rest:
        assert row["graphs"] == 1 and row["recompiled"] == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("rng --rounds 0", "0 must be a whole number of at least 1"),
        ("step_overhead --rounds 0", "0 must be a whole number of at least 1"),
        ("zero_memory --processes 0", "0 must be a whole number of at least 1"),
        ("kernel_tuning --rounds 0", "0 must be a whole number of at least 1"),
        ("kernel_plot --rehearse", "unrecognized arguments: --rehearse"),
    ],
)
def test_wrong_arguments_of_a_benchmark_are_one_line(words, line, capsys):
    name, *rest = words.split()
    with pytest.raises(SystemExit, match="64"):
        importlib.import_module(f"benchmarks.{name}").main(rest)
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
