"""benchmarks/gpu.sh: its budget, what it leaves behind, and that it runs on a machine that has little installed."""

import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bare
import numpy as np
import pytest
import torch

from benchmarks import collect, environment, gpu, layout, pieces, rows, truth, truth_verbs
from benchmarks.pieces import Piece
from benchmarks.truth_data import make_set
from repa_scale import cuda, placement
from repa_scale.data.check import check_set
from repa_scale.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
HANG = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "300"])
open(os.environ["BENCHMARK_OUT"] + "/child", "w").write(str(child.pid))
time.sleep(300)
"""


def script(name, text, seconds=20.0):
    return Piece(name, seconds, ("-c", text), ())


def summary(out):
    return [json.loads(line) for line in (out / "summary.jsonl").read_text().splitlines()]


def test_the_next_piece_runs_whatever_becomes_of_one(tmp_path, monkeypatch, capsys):
    there = "import repa_scale.kernels, importlib.metadata as m; print(repa_scale.__file__, m.version('repa-scale'))"
    wanted = [
        script("environment", there),
        script("fails", "import sys; print('the reason'); sys.exit(3)"),
        script("hangs", HANG, seconds=1.0),
        script("dies", "import os; os.kill(os.getpid(), 9)"),
        script("talks", "print('x' * 999 + '\\n', end='') or [print('x' * 1000) for _ in range(2000)]"),
        Piece("public", 5, ("-c", ""), needs_public=True),
        script("last", "pass"),
    ]
    monkeypatch.setattr(gpu, "pieces", lambda public: wanted)
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    before = sorted((path, path.stat().st_mtime_ns) for path in (ROOT / "benchmarks").rglob("*"))
    out = tmp_path / "out"
    assert gpu.main(["--seconds", "60", "--out", str(out)]) == 1
    assert sorted((path, path.stat().st_mtime_ns) for path in (ROOT / "benchmarks").rglob("*")) == before
    states = [(row["piece"], row["state"], row["exit_code"]) for row in summary(out)]
    assert states == [
        ("environment", "passed", 0),
        ("fails", "failed", 3),
        ("hangs", "timed out", 124),
        ("dies", "failed", -9),
        ("talks", "passed", 0),
        ("public", "not run", None),
        ("last", "passed", 0),
    ]
    status = Path(f"/proc/{(out / 'child').read_text()}/status")  # what a piece started does not outlive it
    assert not status.exists() or "State:\tZ" in status.read_text()
    log = (out / "log.txt").read_text()
    assert str(ROOT) not in re.search(r"== environment.*\n(.*)", log)[1], "the package is the one laid out"
    assert len(log) < gpu.LOGGED + 20_000 and "the rest of the output was dropped" in log
    shown = capsys.readouterr().out
    assert "    the reason" in shown and "failed: fails (failed), hangs (timed out), dies (failed)" in shown


def test_the_budget_holds(tmp_path, monkeypatch):
    wanted = [script("environment", "pass"), *(script(f"long/{i}", "import time; time.sleep(30)") for i in range(4))]
    monkeypatch.setattr(gpu, "pieces", lambda public: wanted)
    monkeypatch.setattr(gpu, "RESERVE", 1.0)
    monkeypatch.setattr(gpu, "LEAST", 1.0)
    began = time.monotonic()
    assert gpu.main(["--seconds", "6", "--out", str(tmp_path / "out")]) == 1
    assert time.monotonic() - began < 6
    assert [row["state"] for row in summary(tmp_path / "out")] == ["passed", "timed out", *3 * ["not run"]]


def test_a_program_that_is_stopped_ends_its_piece_and_cleans_up(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stop = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    wanted = [script("environment", "pass"), script("stopped", stop, 50), script("never", "pass")]
    monkeypatch.setattr(gpu, "pieces", lambda public: wanted)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    began = time.monotonic()
    try:
        assert gpu.main(["--seconds", "60", "--out", str(tmp_path / "out")]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 30
    assert [row["state"] for row in summary(tmp_path / "out")] == ["passed", "interrupted"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_machine_without_a_gpu_is_one_line(tmp_path):
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--seconds", "60", "--out", tmp_path / "out"],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64
    assert "--rehearse needs no GPU" in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert [row["piece"] for row in summary(tmp_path / "out")] == ["environment"]


def test_the_facts_of_a_gpu_are_recorded(monkeypatch, capsys):
    facts = cuda.Facts("2.13.0", "13.0", "13.0", gpus=1, capabilities=((9, 0),), oldest=(8, 0), nccl=None)
    properties = SimpleNamespace(name="H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    monkeypatch.setattr(cuda, "look", lambda: facts)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    found = environment.gpu()
    assert found["name"] == "H100" and found["capability"] == "9.0" and found["driver_cuda"] == "13.0"
    assert "no NCCL" in found["problems"] and "warning" in capsys.readouterr().err
    monkeypatch.setattr(cuda, "look", lambda: replace(facts, capabilities=((7, 5),)))
    with pytest.raises(UserError, match="sm_75"):
        environment.gpu()


def test_an_interpreter_without_torch_is_one_line(tmp_path):
    bare_python = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare_python], check=True)
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--out", tmp_path / "out"],
        env={**os.environ, "PYTHON": str(bare_python / "bin" / "python")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 64
    assert "torch does not import" in done.stdout and "set PYTHON" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert [row["state"] for row in summary(tmp_path / "out")] == ["failed"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "--out"),
        (["--out", "OUT", "--seconds", "3"], "--seconds 3 must be a number of at least 15"),
        (["--out", "OUT", "--seconds", "nan"], "--seconds nan must be a number of at least 15"),
        (["--out", "something/out"], "something/out cannot be written"),
        (["--out", "OUT", "kernel"], "PIECE kernel is not a piece; did you mean 'kernels'?"),
        (["--out", "OUT", "--wheels", "none"], "--wheels none is not a folder"),
        (["--out", "OUT", "--wheels", "."], "holds no wheels"),
        (["--out", "."], "is not an empty folder"),
        (["--out", "OUT", "--fast"], "--fast"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, words, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    assert gpu.main([str(tmp_path / "out") if word == "OUT" else word for word in words]) == 64
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "DIR and PYTHON_VERSION are needed"),
        (["out", "three"], "PYTHON_VERSION three must be one of 3.10 to 3.13"),
        (["out", "3.7"], "PYTHON_VERSION 3.7 must be one of 3.10 to 3.13"),
        (["out", "3.12", "--public", "."], "is not a checkout of the public REPA code (no loss.py)"),
        (["out", "3.12", "--fast"], "unknown option --fast"),
    ],
)
def test_wrong_arguments_of_the_wheels_are_one_line(tmp_path, words, line):
    done = subprocess.run([ROOT / "benchmarks" / "gpu_wheels.sh", *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 64 and line in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_wheels_explain_themselves():
    done = subprocess.run([ROOT / "benchmarks" / "gpu_wheels.sh", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "  benchmarks/gpu_wheels.sh DIR PYTHON_VERSION" in done.stdout


def test_wheels_of_another_python_are_one_line(tmp_path, capsys):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "hjson-3.1.0-cp27-cp27m-win32.whl").write_bytes(b"PK")
    assert gpu.main(["--out", str(tmp_path / "out"), "--wheels", str(wheels)]) == 64
    assert "is not a supported wheel on this platform" in capsys.readouterr().err


def test_a_launcher_around_the_program_does_not_join_its_pieces(tmp_path, monkeypatch):
    """As under `srun --pty`: runs that go side by side would all wait at one port."""
    for name in ("RANK", "MASTER_PORT", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.setenv(name, "1")
    with (tmp_path / "log").open("wb", buffering=0) as log:
        found = layout.prepare(tmp_path, tmp_path, None, True, log)
    assert placement.find(found).launcher == "alone" and "MASTER_PORT" not in found


def test_a_source_tree_that_must_not_be_written_will_do(tmp_path, monkeypatch):
    for name in ("repa_scale", *layout.MAPPED):
        (tmp_path / "tree" / name).mkdir(parents=True)
        (tmp_path / "tree" / name).chmod(0o555)
    (tmp_path / "tree" / "ds_config.json").touch()
    monkeypatch.setattr(layout, "ROOT", tmp_path / "tree")
    with (tmp_path / "log").open("wb", buffering=0) as log:
        layout.prepare(tmp_path, tmp_path, None, True, log)
    folders = [path for path in (tmp_path / "package").rglob("*") if path.is_dir()]
    assert len(folders) > 4 and all(path.stat().st_mode & 0o200 for path in folders)  # root may write anyway


def test_the_layout_is_that_of_the_wheel():
    mapped = re.findall(r'^"repa_scale\.(\w+)" = "\1"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert sorted(mapped) == sorted(layout.MAPPED)


def test_the_page_lists_the_pieces():
    listed = re.findall(r"^\| `([\w/-]+)` \|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert listed == [piece.name for piece in pieces.pieces(None)]


def test_programs_run_without_what_a_gpu_machine_lacks():
    assert {"omegaconf", "accelerate", "jsonschema", "scipy", "streaming", "mlflow"} <= bare.absent()
    done = subprocess.run([sys.executable, ROOT / "tests" / "bare_imports.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "helped: benchmarks.train_throughput" in done.stdout
    assert "test_case[" in done.stdout and "test_a_gpu_draws_what_a_cpu_draws" in done.stdout


def test_rows_need_no_git_and_go_where_they_are_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCHMARK_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("environment", "kernels", "nvjpeg", "rng"):
        rows.write_row(name, {"figure": 1})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "kernels.jsonl", "other.jsonl", "summary.jsonl",
    ]  # fmt: skip
    row = json.loads((tmp_path / "out" / "kernels.jsonl").read_text())
    assert row["commit"] == "none" and row["figure"] == 1
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc1234")
    assert json.loads(rows.write_row("rng", {}).read_text().splitlines()[-1])["commit"] == "abc1234"


# What comes home.


def results_of(folder):
    """Rows as a GPU machine leaves them."""
    folder.mkdir()
    base = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "commit": "abc1234", "date": "2026-01-01"}
    lines = {
        "summary": [
            {"benchmark": "environment", **base, "versions": {"torch": "2.11.0"}, "host": {}, "gpu": {"driver": "580"}},
            {"benchmark": "gpu", "piece": "truth", "state": "passed", "exit_code": 0, "seconds": 50.0},
            {
                "benchmark": "gpu", "piece": "tuning", "state": "not run", "exit_code": None, "seconds": 0.0,
                "reason": "no time left",
            },
        ],
        "train_throughput": [
            {
                "benchmark": "train_throughput", **base, "case": "ours, batch 32", "images_per_second": 301.5,
                "step_seconds": 0.1, "host_seconds": 0.05, "mfu": 0.3, "peak_memory_bytes": 4e10,
            },
            {"benchmark": "train_throughput", **base, "case": "public, batch 64", "error": "out of memory"},
        ],
    }  # fmt: skip
    for name, values in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (folder / "trace.json.gz").write_bytes(gzip.compress(b"{}"))
    return folder


def test_collecting_files_each_row_once(tmp_path, monkeypatch, capsys):
    home = tmp_path / "results"
    home.mkdir()
    monkeypatch.setattr(rows, "RESULTS", home)
    came = results_of(tmp_path / "came")
    for _ in range(2):
        assert collect.main([str(came)]) == 0
    shown = capsys.readouterr().out
    assert "5 new rows of 5" in shown and "0 new rows of 5" in shown
    assert "| tuning | not run: no time left |" in shown
    assert "| ours, batch 32 | 301.5 | 100.0 | 50.0 | 30.0% | 40.0 |" in shown
    piece, _ = (json.loads(line) for line in (home / "gpu.jsonl").read_text().splitlines())
    assert piece["device"] == "NVIDIA H100 80GB HBM3" and piece["commit"] == "abc1234"
    assert len((home / "train_throughput.jsonl").read_text().splitlines()) == 2
    assert (home / "trace-NVIDIA_H100_80GB_HBM3.json.gz").is_file()


def test_damaged_results_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    assert collect.main([str(tmp_path)]) == 64
    assert "holds no summary.jsonl" in capsys.readouterr().err
    came = results_of(tmp_path / "came")
    with (came / "summary.jsonl").open("a") as file:
        file.write('{"benchm')
    assert collect.main([str(came)]) == 64
    assert "summary.jsonl, line 4 is damaged" in capsys.readouterr().err
    for number, foreign in enumerate((b'{"benchmark": "truth", "case": "x"}', b'{"benchmark": ["x"]}', b"\xff")):
        came = results_of(tmp_path / f"foreign {number}")
        (came / "other.jsonl").write_bytes(foreign + b"\n")
        assert collect.main([str(came)]) == 64
        error = capsys.readouterr().err
        assert ("does not understand" in error or "is damaged" in error) and error.count("\n") == 1


# Truth.


def test_the_drawn_set_is_one_that_training_takes(tmp_path):
    dataset, found = check_set(make_set(tmp_path / "set"), None, lambda *_: None)
    assert not found.problems and found.decoded == dataset.count == 256
    assert (
        make_set(tmp_path / "again")
        and (tmp_path / "again" / "index.json").read_bytes() == (tmp_path / "set" / "index.json").read_bytes()
    )


def test_no_gpu_test_is_skipped_in_the_program(request, monkeypatch):
    plugin = request.config.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    monkeypatch.setattr(plugin, "REHEARSAL", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    marks = []
    item = SimpleNamespace(get_closest_marker=lambda name: name == "gpu", add_marker=marks.append)
    monkeypatch.delenv("BENCHMARK_OUT", raising=False)
    plugin.pytest_collection_modifyitems([item])
    assert len(marks) == 1
    monkeypatch.setenv("BENCHMARK_OUT", "results")
    plugin.pytest_collection_modifyitems([item])
    assert len(marks) == 1


@pytest.mark.parametrize("program", [False, True])
def test_the_checkpoint_of_truth_is_kept_for_the_program_alone(tmp_path, monkeypatch, program):
    home, out = tmp_path / "results", tmp_path / "out"
    monkeypatch.setattr(rows, "RESULTS", home)
    monkeypatch.setenv("BENCHMARK_OUT", str(out) if program else "")
    monkeypatch.setattr(truth, "_side_by_side", lambda *_: [])
    monkeypatch.setattr(truth, "curves_of", lambda run: json.loads(truth.REFERENCE.read_text())["curves"]["fp32"])
    monkeypatch.setattr(truth, "resumed", lambda *_: [])
    monkeypatch.setattr(truth, "pack", lambda run, steps, file: file.write_bytes(b"packed"))
    monkeypatch.setattr(truth, "read_back", lambda file: [])
    truth.measure(tmp_path, "cpu", 30, 15)
    assert not home.exists() and (out / truth.TAR).exists() == program


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_truth_of_a_gpu_is_not_measured_on_a_cpu(capsys):
    assert truth.main(["--device", "cuda"]) == 64
    assert "device cuda: " in capsys.readouterr().err


def test_a_curve_that_leaves_the_reference_is_found():
    reference = json.loads(truth.REFERENCE.read_text())["curves"]["fp32"]
    same = {key: values[:6] for key, values in reference.items()}
    assert all(check.passed for check in truth.against("same", same, reference, truth.FP32_BOUNDS))
    for key in truth.CURVES:
        off = {**same, key: [*same[key][:5], same[key][5] * 1.01]}
        wrong = [check for check in truth.against("off", off, reference, truth.FP32_BOUNDS) if not check.passed]
        assert [check.what for check in wrong] == [f"{key} against the CPU's"]
        gone = {**same, key: [*same[key][:5], "nan"]}
        assert not all(check.passed for check in truth.against("nan", gone, reference, truth.FP32_BOUNDS))
    other = {**same, "batch_fingerprint": [*same["batch_fingerprint"][:5], "0"]}
    assert not truth.against("data", other, reference, truth.FP32_BOUNDS)[0].passed


def test_bf16_is_told_from_fp32():
    """The bounds are of use only if each precision's curve breaks the other's."""
    curves = json.loads(truth.REFERENCE.read_text())["curves"]
    checks = truth.against("bf16 for fp32", curves["bf16"], curves["fp32"], truth.FP32_BOUNDS)
    assert not any(check.passed for check in checks[1:])


def test_a_verb_that_does_not_come_through_is_told_and_the_others_are_compared(tmp_path, monkeypatch, capsys):
    def serve(work):
        truth_verbs.process(["-c", "print('the reason'); raise SystemExit(3)"])

    def sample(work):
        assert work.folder.is_dir() and (work.images, work.size) == (2, 32)
        return [truth.Check("sample", "levels", 2, 1), truth.Check("sample", "peak", math.nan, 1)]

    monkeypatch.setattr(truth_verbs, "CASES", {"serve": serve, "sample": sample})
    monkeypatch.setattr(truth_verbs, "make_model", lambda folder, size: folder)
    monkeypatch.setenv("BENCHMARK_OUT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert truth_verbs.main(["--rehearse"]) == 1
    shown = capsys.readouterr().out
    assert "exited with code 3" in shown and "the reason" in shown
    found = [json.loads(line) for line in (tmp_path / "truth.jsonl").read_text().splitlines()]
    assert [(row["case"], row["passed"]) for row in found] == [("serve", False), ("sample", False), ("sample", False)]


def test_pictures_and_latents_that_differ_are_told_from_equal_ones():
    pictures = np.random.RandomState(0).randint(0, 256, (2, 8, 8, 3), np.uint8)
    assert truth_verbs.apart(pictures, pictures) == 0 == truth_verbs.flat(pictures)
    assert truth_verbs.apart(pictures, pictures[:1]) == math.inf and truth_verbs.flat(pictures * 0) == 2
    assert truth_verbs.apart(np.uint8([[0]]), np.uint8([[255]])) == 255
    x = torch.tensor([1.0, -4.0])
    assert truth_verbs.relative(x, x) == 0 and truth_verbs.relative(x + 1, x) == 0.25
    assert math.isnan(truth_verbs.relative(x * math.nan, x)) and truth_verbs.relative(x[:1], x) == math.inf


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_a_rehearsal_in_a_bare_environment(tmp_path):
    """Every piece on the CPU, with the wheels that a machine is brought and nothing else of ours. Needs a network."""
    python = bare.linked_environment(tmp_path / "environment")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    wheels = tmp_path / "wheels"
    subprocess.run(
        [ROOT / "benchmarks" / "gpu_wheels.sh", wheels, version],
        env={**os.environ, "PYTHON": sys.executable},
        check=True,
    )
    assert sum(path.stat().st_size for path in wheels.iterdir()) < 20 << 20
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    out = tmp_path / "out"
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--rehearse", "--seconds", "2000", "--out", out, "--wheels", wheels],
        env={**clean, "PYTHON": str(python)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {row["piece"]: row["state"] for row in summary(out) if row["benchmark"] == "gpu"}
    public = {piece.name for piece in pieces.pieces(None) if piece.needs_public}
    assert {name for name, state in states.items() if state != "passed"} == public
    assert len(list(out.iterdir())) <= 8
    assert all(path.stat().st_size <= 16 << 20 for path in out.iterdir())
    assert collect.main([str(out)]) == 0
    _damage(out / truth.TAR)
    assert collect.main([str(out)]) == 1


def _damage(file: Path) -> None:
    """Flips a byte of a tensor in the checkpoint of a tar."""
    with tarfile.open(file) as tar:
        member = next(member for member in tar if member.name.endswith(".safetensors"))
    with file.open("r+b") as data:
        data.seek(member.offset_data + member.size // 2)
        byte = data.read(1)
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte[0] ^ 1]))
