"""Sampling at scale: the same bytes from any number of processes, over kills and stops; what stands in the sidecar."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import BIN, free_port
from safetensors.torch import save_file

from repa_scale import arithmetic, cli, sample, sample_draw, sample_recipe
from repa_scale.compose import compose
from repa_scale.errors import ConfigError, DataError
from repa_scale.models import build_sit
from repa_scale.sample_blocks import Blocks, merge, npy_header
from repa_scale.sample_recipe import Recipe, differing
from repa_scale.sealed import seal_folder
from repa_scale.trained import load_trained


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An export of a small model of 8-pixel digits with random weights, none of them zero."""
    folder = tmp_path_factory.mktemp("model")
    config = compose(["experiment=demo_repa", "model.name=SiT-Nano/2"])
    network = build_sit(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, folder / "model.safetensors"
    )
    facts = {"step": 3, "samples": 24, "identity_hash": "i" * 16, "pair_id": "p" * 16, "weights": "ema", "source": ""}
    (folder / "config.json").write_text(json.dumps({"trained": facts, "config": asdict(config)}))
    seal_folder(folder, {"form": "safetensors"})
    return folder


@pytest.fixture
def signals():
    """Sampling takes the signals; they are given back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Start:
    """`repa-scale sample` on some processes, as a user starts it."""

    def __init__(self, words, processes=1):
        launcher = [BIN / "torchrun", "--nproc-per-node", processes, "--master-port", free_port()]
        command = [*launcher, "-m", "repa_scale"] if processes > 1 else [sys.executable, "-m", "repa_scale"]
        self.process = subprocess.Popen(
            [str(word) for word in (*command, "sample", *words, "--device", "cpu")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def end(self):
        """(exit code, stderr)"""
        _, errors = self.process.communicate(timeout=240)
        return self.process.returncode, errors

    def succeed(self):
        code, errors = self.end()
        assert code == 0, errors

    def when_there_are(self, blocks, folder, act):
        """Acts as soon as so many blocks are finished."""
        until = time.monotonic() + 120
        while len(list(folder.glob("block_*.npy"))) < blocks:
            assert self.process.poll() is None and time.monotonic() < until, self.process.stderr.read()
            time.sleep(0.002)
        act(self.process)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(model, out, *words):
    assert sample.main([str(model), "--out", str(out), "--device", "cpu", *map(str, words)]) == 0
    with np.load(out, allow_pickle=False) as archive:
        return archive["arr_0"], archive["labels"], json.loads(out.with_suffix(".json").read_text())


def from_many_starts(model, folder, words, processes, blocks, killed=1):
    """The archives' sha256: from each number of processes, and after two SIGKILLs."""
    found = {}
    for number in processes:
        out = folder / f"{number}.npz"
        if number == 1:
            draw(model, out, *words)
        else:
            Start([model, *words, "--out", out], number).succeed()
        found[number] = sha256(out)
    out = folder / "killed.npz"
    unfinished = folder / "killed.npz.blocks"
    for share in (1, 2):
        wanted = share * blocks // 3
        Start([model, *words, "--out", out], killed).when_there_are(wanted, unfinished, kill)
        assert not out.exists() and wanted <= len(list(unfinished.glob("block_*.npy"))) < blocks
    draw(model, out, *words)
    assert not unfinished.exists() and not list(folder.glob("*tmp*"))
    return {**found, "killed": sha256(out)}


@pytest.mark.distributed
def test_one_or_two_processes_and_two_kills_give_the_same_bytes(model, tmp_path, signals):
    words = ["-n", 132, "--batch", 8, "--sampler", "sde", "--steps", 40, "--guidance", 1.8, "--interval", 0, 0.7]
    found = from_many_starts(model, tmp_path, words, (1, 2), 17)
    assert len(set(found.values())) == 1, found
    sidecar = json.loads((tmp_path / "killed.json").read_text())
    assert sidecar["sha256"] == found[1] and sidecar["bytes"] == (tmp_path / "1.npz").stat().st_size
    with np.load(tmp_path / "1.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["labels"]
    assert (
        images.shape == (132, 8, 8, 3) and images.dtype == np.uint8 and labels.tolist() == [i % 10 for i in range(132)]
    )
    assert hashlib.sha256(images.tobytes()).hexdigest() == sidecar["arr_0_sha256"]
    assert len(np.unique(images.reshape(132, -1), axis=0)) == 132, "no two samples are the same"


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_a_thousand_samples_from_1_2_and_4_processes_and_after_two_kills(model, tmp_path, signals):
    words = ["-n", 1000, "--batch", 32, "--sampler", "sde", "--steps", 50, "--guidance", 1.8, "--interval", 0, 0.7]
    found = from_many_starts(model, tmp_path, words, (1, 2, 4), 32, killed=4)
    assert len(set(found.values())) == 1, found


@pytest.mark.distributed
def test_a_wish_to_stop_ends_it_with_75_and_it_goes_on(model, tmp_path, signals, capsys):
    words = [model, "--n", 100, "--batch", 4, "--steps", 60, "--out", tmp_path / "a.npz"]
    start = Start(words)
    start.when_there_are(3, tmp_path / "a.npz.blocks", lambda process: process.send_signal(signal.SIGTERM))
    code, errors = start.end()
    assert code == 75 and "start the same command again" in errors, errors
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "a.npz.blocks").glob("block_*.npy")}
    assert 3 <= len(drawn) < 25
    with pytest.raises(ConfigError, match=r"other samples \(there -> here: steps: 60 -> 61\)"):
        sample.main([str(word) for word in [*words, "--steps", 61, "--device", "cpu"]])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a.npz.blocks").glob("block_*.npy")} == drawn
    assert sample.main([str(word) for word in [*words, "--device", "cpu"]]) == 0
    made = (tmp_path / "a.npz").stat().st_mtime_ns
    assert sample.main([str(word) for word in [*words, "--device", "cpu"]]) == 0
    assert "they were there already" in capsys.readouterr().err
    assert (tmp_path / "a.npz").stat().st_mtime_ns == made
    with (tmp_path / "a.npz").open("r+b") as file:  # one that is not whole any more is drawn again
        file.seek(1000)
        file.write(b"damaged")
    assert sample.main([str(word) for word in [*words, "--device", "cpu"]]) == 0
    assert sha256(tmp_path / "a.npz") == json.loads((tmp_path / "a.json").read_text())["sha256"]


def test_labels_are_balanced_or_drawn_and_a_sample_is_a_function_of_its_number(model, tmp_path, signals, capsys):
    words = ("--batch", 8, "--steps", 2)
    _, labels, facts = draw(model, tmp_path / "balanced.npz", "--n", 30, *words)
    assert np.bincount(labels).tolist() == [3] * 10 and facts["classes"] == "balanced"
    assert capsys.readouterr().err == ""
    images, labels, facts = draw(model, tmp_path / "random.npz", "--n", 300, "--classes", "random", *words)
    assert facts["classes"] == "random" and facts["block"] == 8
    counts = np.bincount(labels, minlength=10)
    assert len(set(counts.tolist())) > 1 and counts.min() > 10
    fewer, same, _ = draw(model, tmp_path / "fewer.npz", "--n", 43, "--classes", "random", *words)
    assert np.array_equal(fewer, images[:43]) and np.array_equal(same, labels[:43])
    other, *_ = draw(model, tmp_path / "other.npz", "--n", 43, "--classes", "random", "--seed", 1, *words)
    assert not np.array_equal(other, fewer)
    draw(model, tmp_path / "few.npz", "--n", 3, *words)
    assert "only the first 3 of 10 classes" in capsys.readouterr().err
    draw(model, tmp_path / "odd.npz", "--n", 12, *words)
    assert "the first 2 of 10 classes have 2 samples, the others 1" in capsys.readouterr().err


def test_the_sidecar_names_all_that_the_images_depend_on(model, tmp_path, signals):
    """Each setting that changes the recipe changes what is drawn, and is in the sidecar."""
    base = ("--n", 10, "--batch", 4, "--steps", 3, "--guidance", 2)
    images, _, facts = draw(model, tmp_path / "base.npz", *base)
    recipe = facts["recipe"]
    assert recipe["checkpoint"] == f"sha256:{json.loads((model / 'manifest.json').read_text())['sha256']}"
    assert recipe["versions"]["torch"] == torch.__version__ and recipe["rounding"] == "round((x + 1) / 2 * 255)"
    changes = {
        "steps": ("--steps", 4),
        "guidance": ("--guidance", 3),
        "interval": ("--interval", 0, 0.5),
        "sampler": ("--sampler", "heun"),
        "precision": ("--precision", "bf16"),
        "classes": ("--labels", 3, 4),
        "seed": ("--seed", 7),
    }
    for key, words in changes.items():
        changed, _, theirs = draw(model, tmp_path / f"{key}.npz", *base, *words)
        assert (
            differing(recipe, theirs["recipe"]).startswith(f"{key}: ")
            and differing(recipe, theirs["recipe"]).count("->") == 1
        )
        assert not np.array_equal(changed, images), key


def test_a_block_is_computed_by_one_thread(model, tmp_path, signals, monkeypatch):
    """Of a larger model two threads give other bits than one (of this one they do not), so what is seen is their
    number, whatever the process has."""
    seen, found = set(), set()
    build = type(load_trained(model)).build

    def watched(self, device):
        network = build(self, device)
        network.register_forward_pre_hook(lambda *_: seen.add(torch.get_num_threads()))
        return network

    monkeypatch.setattr(type(load_trained(model)), "build", watched)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            draw(model, tmp_path / f"{threads}.npz", "--n", 21, "--batch", 7, "--steps", 3)
            found.add(sha256(tmp_path / f"{threads}.npz"))
            assert torch.get_num_threads() == threads, "it is given back"
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1 and seen == {1}


def test_the_null_branch_is_computed_inside_the_interval_alone(model, tmp_path, signals, monkeypatch):
    """Rows that pass the model, counted: 8 of a block for each of 10 steps, twice that inside the interval."""
    rows = []
    build = type(load_trained(model)).build

    def counted(self, device):
        network = build(self, device)
        network.register_forward_pre_hook(lambda _, inputs: rows.append((inputs[1][0].item(), len(inputs[0]))))
        return network

    monkeypatch.setattr(type(load_trained(model)), "build", counted)
    draw(model, tmp_path / "a.npz", "--n", 8, "--steps", 10, "--guidance", 2, "--interval", 0.25, 0.65)
    assert [(round(t, 2), n) for t, n in rows] == [
        (t, 16 if 0.25 <= t <= 0.65 else 8) for t in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
    ]
    rows.clear()
    draw(model, tmp_path / "b.npz", "--n", 8, "--steps", 10, "--guidance", 1)
    assert {n for _, n in rows} == {8}, "no guidance, no null branch"


def recipe_of(count, size, block, **changes) -> Recipe:
    values = {name: "" for name in Recipe.__dataclass_fields__} | {"interval": (0.0, 1.0), "latents": ("", "", "")}
    values |= {"count": count, "block": block, "image_size": size, "num_classes": 10, "classes": "balanced"}
    return Recipe(**values | changes)


def test_ranks_that_would_draw_other_samples_or_do_not_see_the_folder_are_refused(tmp_path):
    one = recipe_of(10, 4, 4, device="GPU A")
    assert sample.agreed([one, one]) == one
    with pytest.raises(ConfigError, match=r"rank 1 .* \(device: GPU A -> GPU B\)"):
        sample.agreed([one, recipe_of(10, 4, 4, device="GPU B")])
    with pytest.raises(ConfigError, match="a folder that all nodes share"):
        sample._see(Blocks(tmp_path / "not made.npz.blocks", one))


class Network(torch.nn.Module):
    """A model of one block, and a latent space, which note in what arithmetic they are asked to compute."""

    def __init__(self, seen):
        super().__init__()
        self.blocks, self.seen = torch.nn.ModuleList([torch.nn.Identity()]), seen

    def build(self, device):
        return self

    def forward(self, x, t, labels):
        self.seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return torch.zeros_like(x), {}

    def decode(self, latents, at_a_time):
        self.forward(latents, None, None)
        return torch.zeros(len(latents), 3, 8, 8, dtype=torch.uint8)


class Cuda:
    """Says that it is a GPU; what is made on it is made on the CPU."""

    type = "cuda"


def drawer_on_a_gpu(monkeypatch, **more):
    recipe = Recipe(
        **{
            **dict.fromkeys(("checkpoint", "identity_hash", "weights", "rounding", "device"), ""),
            **{"step": 1, "sampler": "euler", "steps": 2, "guidance": 1.0, "interval": (0.0, 1.0), "seed": 0},
            **{"count": 2, "block": 2, "decode": 2, "classes": "balanced", "num_classes": 0, "image_size": 8},
            **{"path": "linear", "latents": ("identity", "", ""), "precision": "fp32", "compile": False},
            "versions": {},
            **more,
        }
    )
    seen, arange = [], torch.arange
    monkeypatch.setattr(torch, "arange", lambda *a, device="cpu", **k: arange(*a, **k))
    trained = Network(seen)
    trained.config = compose(["experiment=demo_repa", "model.name=SiT-Nano/2"])
    drawer = sample_draw.Drawer(trained, recipe, trained, Cuda())
    return drawer, seen


@pytest.mark.parametrize(
    ("precision", "wanted"), [("fp32", ("ieee", "ieee")), ("tf32", ("tf32", "tf32")), ("bf16", ("tf32", "tf32"))]
)
def test_float32_on_a_gpu_is_what_the_recipe_says(precision, wanted, monkeypatch):
    """In the model and the VAE, in convolutions and products; torch's own default is TF32 in convolutions alone."""
    if precision == "bf16":
        monkeypatch.setattr(torch, "autocast", lambda *_: nullcontext())
    drawer, seen = drawer_on_a_gpu(monkeypatch, precision=precision)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    drawer(0)
    assert seen == [wanted] * 3
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


def test_compiled_samples_choose_nothing_by_timing(monkeypatch):
    from torch._inductor import config

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda block, **words: compiled.append(words) or block)
    drawer_on_a_gpu(monkeypatch, compile=True)
    options = compiled[0]["options"]
    monkeypatch.setattr(config, "max_autotune", True)  # as TORCHINDUCTOR_MAX_AUTOTUNE=1 would
    monkeypatch.setattr(config, "coordinate_descent_tuning", True)
    with config.patch(options):  # raises for what Inductor does not know
        assert config.deterministic
        assert not (config.max_autotune or config.max_autotune_gemm or config.coordinate_descent_tuning)


def test_the_recipe_names_what_multiplies_on_a_gpu(monkeypatch):
    """Another architecture, part of a GPU, cuBLAS or cuDNN: another recipe, and blocks of one are not mixed."""
    facts = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(arithmetic, "_cublas", lambda: "13.1.0")
    gpu = torch.device("cuda")
    assert sample_recipe.device_of(gpu) == "NVIDIA H100 80GB HBM3 sm_90 132 SMs"
    assert arithmetic.libraries(gpu) == {"cuda": "13.0", "cublas": "13.1.0 Cublas", "cudnn": "91900"}
    assert arithmetic.libraries(torch.device("cpu")) == {}  # a recipe of a CPU stays as earlier releases wrote it


def test_the_version_of_cublas_is_the_loaded_librarys(monkeypatch):
    class Library:
        def cublasGetProperty(self, number, place):
            place._obj.value = (13, 1, 0)[number]
            return 0

    opened = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(arithmetic.ctypes, "CDLL", lambda name: opened.append(name) or Library())
    assert (arithmetic._cublas(), opened) == ("13.1.0", ["libcublas.so.13"])
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    assert arithmetic._cublas() == "unknown"


def test_an_archive_is_written_without_holding_it(tmp_path):
    """65 MB of images, a block of 4 MB at a time."""
    import tracemalloc

    recipe = recipe_of(1_330, 128, 85)
    blocks = Blocks(tmp_path / "big.npz.blocks", recipe)
    blocks.open()
    generator = np.random.default_rng(0)
    parts = [generator.integers(0, 256, (recipe.size_of(b), 128, 128, 3), dtype=np.uint8) for b in range(recipe.blocks)]
    for number, part in enumerate(parts):
        blocks.write(number, part)
    assert blocks.missing() == [] and blocks.finished() == 1_330
    tracemalloc.start()
    facts = merge(blocks, tmp_path / "big.npz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert facts["bytes"] > 65e6 and peak < 25e6, peak
    with np.load(tmp_path / "big.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["arr_0"], np.concatenate(parts)) and len(archive["labels"]) == 1_330
    assert zipfile.ZipFile(tmp_path / "big.npz").testzip() is None
    assert sha256(tmp_path / "big.npz") == facts["sha256"]


def test_an_archive_may_be_larger_than_4_gb():
    """Its first member's header has room for 64-bit sizes, and .npy headers are those of numpy."""
    import io

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.zeros((3, 2, 2, 3), np.uint8))
    assert buffer.getvalue()[:-36] == npy_header((3, 2, 2, 3), np.uint8)
    from repa_scale.sample_blocks import _member

    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive, _member(archive, "arr_0.npy") as stream:
        stream.write(b"x")
    version_needed = int.from_bytes(sink.getvalue()[4:6], "little")
    assert version_needed == 45, "zip64"


def test_a_half_block_is_drawn_again(tmp_path):
    recipe = recipe_of(10, 4, 4)
    blocks = Blocks(tmp_path / "a.npz.blocks", recipe)
    blocks.open()
    for number in range(3):
        blocks.write(number, np.zeros((recipe.size_of(number), 4, 4, 3), np.uint8))
    path = tmp_path / "a.npz.blocks" / "block_00000001.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert blocks.missing() == [1] and blocks.finished() == 6
    with pytest.raises(ConfigError, match=r"other samples \(there -> here: count: 10 -> 11\)"):
        Blocks(tmp_path / "a.npz.blocks", recipe_of(11, 4, 4)).open()


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--n", "0"], "--n 0 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--batch", "-1"], "--batch -1 must be at least 1"),
        (["--guidance", "nan"], "--guidance nan must be a number of 0 or more"),
        (["--guidance", "-1"], "--guidance -1.0 must be a number of 0 or more"),
        (["--interval", "0.7", "0"], "--interval 0.7 0 must be two rising times"),
        (["--interval", "0", "nan"], "must be two rising times"),
        (["--labels", "11"], "this model has labels 0 to 9"),
        (["--labels", "1", "--classes", "random"], "both choose the labels"),
        (["--n", "1000000000000", "--batch", "1000"], "make room or choose another place"),
        (["--out", "/proc/nowhere/a.npz"], "cannot be written"),
        (["--out", "/dev/null/folder"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(model, tmp_path, signals, words, part, capsys):
    out = [] if "--out" in words else ["--out", str(tmp_path / "a.npz")]
    assert cli.main(["sample", str(model), *out, "--device", "cpu", "--steps", "1", *words]) == 64
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and part in lines[0], lines
    assert not (tmp_path / "a.npz").exists()


def test_weights_that_diverged_and_saves_that_did_not_finish(model, tmp_path, signals, capsys):
    (tmp_path / "checkpoints" / "step_00000002.tmp-1").mkdir(parents=True)
    with pytest.raises(DataError, match="a save that was not finished"):
        load_trained(tmp_path / "checkpoints" / "step_00000002.tmp-1")
    from safetensors.torch import load_file

    tensors = load_file(model / "model.safetensors")
    tensors["x_embedder.proj.bias"][0] = float("nan")
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_text((model / "config.json").read_text())
    seal_folder(broken, {"form": "safetensors"})
    words = ["sample", str(broken), "--n", "4", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "a.npz")]
    assert cli.main(words) == 64
    assert "are not finite" in capsys.readouterr().err


def test_deepspeeds_rank_flag_before_the_verb_is_dropped(capsys):
    assert cli.main(["--local_rank=1", "--version"]) == 0
    assert "repa-scale" in capsys.readouterr().out
